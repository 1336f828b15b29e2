"""`lora-fx inspect`."""

import click

from lora_fx.cli.options import format_option, output_option, trust_option
from lora_fx.cli.output import write
from lora_fx.cli.verbs import DIFFERS
from lora_fx.text import json_text


@click.command("inspect")
@click.argument("adapter", type=click.Path())
@click.argument("model", required=False)
@click.option("--weights", is_flag=True, help="Load MODEL with its values, and compare those of the base.")
@format_option("text", "json")
@output_option
@trust_option
@click.pass_context
def command(
    context: click.Context, adapter: str, model: str | None, weights: bool, form: str, output: str, trust: bool
) -> None:
    """Show what is in an adapter's directory.

    With MODEL, check that it fits, too (exit 1 if it does not).

    Without MODEL no torch is needed: the configuration and the header are read, no values.  With MODEL all values are
    read and checked, and names and shapes compared; with --weights the values of the base as well, as far as the
    adapter notes them.
    """
    from lora_fx.files.adapter.contents import contents_of

    if weights and model is None:
        raise click.UsageError("--weights needs a MODEL to compare with")
    contents, fit = contents_of(adapter), None
    if model is not None:
        from lora_fx.cli.models.fit import fit_of

        fit = fit_of(adapter, model, trust, weights)
    if form == "json":
        verdict = {} if fit is None else fit.document()
        write(json_text(contents.document() | verdict, indent=1), output, form)
    else:
        write(str(contents) if fit is None else f"{contents}\n{fit}", output, form)
    context.exit(DIFFERS if fit is not None and fit.reasons else 0)
