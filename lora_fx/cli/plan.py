"""`lora-fx plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_fx.cli.mesh import MeshOptions, counted, mesh_options
from lora_fx.cli.options import (
    FORMATS,
    STANDARD,
    format_option,
    model_argument,
    output_option,
    progress_option,
    rules_argument,
    rules_of,
    trust_option,
    watched,
)
from lora_fx.cli.output import terminal_width, write
from lora_fx.cli.verbs import DIFFERS

if TYPE_CHECKING:
    from lora_fx.planning.plan import Plan


@click.command("plan")
@model_argument
@rules_argument(required=False)
@format_option(*FORMATS)
@click.option("--all", "everything", is_flag=True, help="Show repeated blocks one by one.")
@click.option("--stat", is_flag=True, help="Show only the sums, by rule.")
@click.option("--expect", metavar="FILE", help="Compare with a saved plan; exit 1 and show what differs.")
@mesh_options
@output_option
@progress_option
@trust_option
@click.pass_context
def command(
    context: click.Context,
    /,
    model: str,
    rules: str | None,
    form: str,
    everything: bool,
    stat: bool,
    expect: str | None,
    output: str,
    no_progress: bool,
    trust: bool,
    **mesh: Any,
) -> None:
    """Show what RULES would do to MODEL, and why.

    Every weight that multiplies is listed with what would be done to it; nothing is changed.  MODEL may be a plan that
    was saved with --format json; RULES are left out then.

    With --mesh a step of training is counted instead, on the meta device: bytes and FLOPs of each device.  The inputs
    of one device are those that MODEL's factory gives, or --tokens (of hf: 1x2048).
    """
    asked = MeshOptions(**mesh)
    asked.check(form, other=everything or stat or expect is not None)
    if asked.mesh is not None:
        budget = counted(model, rules, asked, trust)
        columns = terminal_width() if output == STANDARD else None
        write(budget.to_json() if form == "json" else budget.text(columns), output, form)
        return
    from lora_fx.cli.rendering import plan_as, plan_diff_as
    from lora_fx.cli.saved import read_plan
    from lora_fx.planning.diff import plan_diff

    expected = None if expect is None else read_plan(expect)
    current = planned(model, rules, trust, watched(no_progress))
    if expected is not None:
        diff = plan_diff(expected, current, (str(expect), f"{current.model} · {current.source}"))
        write(plan_diff_as(diff, form, stat), output, form)
        context.exit(DIFFERS if diff else 0)
    width = terminal_width() if output == STANDARD and form == "text" else None
    write(plan_as(current, form, not everything, stat, width), output, form)


def planned(model: str, rules: str | None, trust: bool, progress: bool | None) -> "Plan":
    """Return the plan of a model by rules, or a saved one."""
    from lora_fx.cli.saved import read_plan

    if rules is None:
        if not model.endswith(".json") and model != "-":
            forms = "a file (lora-fx init MODEL writes a first one), a shipped name, or a saved plan.json as MODEL"
            raise click.UsageError(f"RULES are missing: {forms}")
        return read_plan(model)
    if Path(model).suffix == ".json" and not model.endswith(".index.json"):
        raise click.UsageError(f"{model} is a saved plan, which has its rules already; leave out '{rules}'")
    read = rules_of(rules)  # a misspelt rule is an error before torch is imported
    from lora_fx.api import plan
    from lora_fx.cli.models.spec import load_model

    built, inputs = load_model(model, trust=trust)
    return plan(built, read, inputs, progress=progress)
