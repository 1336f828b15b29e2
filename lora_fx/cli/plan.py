"""`lora-fx plan`."""

from __future__ import annotations

import click

from lora_fx.cli.options import format_option, model_argument, output_option, rules_argument, rules_of
from lora_fx.cli.output import write


@click.command("plan")
@model_argument
@rules_argument()
@format_option("text", "json")
@click.option("--all", "everything", is_flag=True, help="Show repeated blocks one by one.")
@output_option
def command(model: str, rules: str, form: str, everything: bool, output: str) -> None:
    """Show what RULES would do to every linear of MODEL, and why; nothing is changed."""
    read = rules_of(rules)
    from lora_fx.api import plan as make_plan
    from lora_fx.modelspec import load_model
    from lora_fx.plantext import plan_text

    built, inputs = load_model(model)
    found = make_plan(built, read, inputs)
    write(found.to_json() if form == "json" else plan_text(found, fold=not everything), output)
