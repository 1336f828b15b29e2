"""`lora-fx diff`."""

import click

from lora_fx.cli.options import (
    FORMATS,
    complete_rules,
    format_option,
    output_option,
    progress_option,
    trust_option,
    watched,
)
from lora_fx.cli.output import write
from lora_fx.cli.verbs import DIFFERS


@click.command("diff")
@click.argument("a", shell_complete=complete_rules)
@click.argument("others", metavar="[B] [RULES]...", nargs=-1, shell_complete=complete_rules)
@format_option(*FORMATS)
@click.option("--stat", is_flag=True, help="Show only what has changed how much.")
@click.option("--exit-code", is_flag=True, help="Exit 1 if there is a difference, as git diff does.")
@output_option
@progress_option
@trust_option
@click.pass_context
def command(
    context: click.Context,
    a: str,
    others: tuple[str, ...],
    form: str,
    stat: bool,
    exit_code: bool,
    output: str,
    no_progress: bool,
    trust: bool,
) -> None:
    """Show how two graphs, or two plans, differ.

    \b
      diff MODEL RULES          a model before and after
      diff MODEL RULES RULES    a model adapted in two ways
      diff A B                  two MODELs, .pt2 files, saved graphs or saved plans
      diff MODEL -o FILE        nothing to compare with: its graph is saved as JSON

    Two JSON files are compared without torch.
    """
    if not others:
        from lora_fx.cli.models.spec import graph_text

        write(graph_text(a, trust), output, "json")
        return
    from lora_fx.cli.differences import difference, shown

    diff = difference(a, others, trust, watched(no_progress))
    write(shown(diff, form, stat), output, form)
    context.exit(DIFFERS if diff and exit_code else 0)
