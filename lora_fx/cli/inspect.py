"""`lora-fx inspect`."""

import click

from lora_fx.cli.options import format_option, output_option, trust_option
from lora_fx.cli.output import write
from lora_fx.cli.verbs import DIFFERS, text_of
from lora_fx.errors import AdapterMismatchError, RefusedError


@click.command("inspect")
@click.argument("adapter", type=click.Path())
@click.argument("model", required=False)
@format_option("text", "json")
@output_option
@trust_option
@click.pass_context
def command(context: click.Context, adapter: str, model: str | None, form: str, output: str, trust: bool) -> None:
    """Show what is in an adapter's directory.

    With MODEL, check that it fits, too (exit 1 if it does not).

    Without MODEL no torch is needed: the configuration and the header are read, no values.  With MODEL all values are
    read and checked, and names and shapes compared; MODEL has no weights, so that its values are not.
    """
    from lora_fx.files.adapter.contents import contents_of

    contents = contents_of(adapter)
    write(contents.to_json() if form == "json" else str(contents), output, form)
    if model is not None:
        from lora_fx.cli.models.spec import check_fit

        try:
            click.echo(check_fit(adapter, model, trust), err=form == "json")
        except (AdapterMismatchError, RefusedError) as error:
            click.echo(f"lora-fx: {text_of(error)}", err=True)
            context.exit(DIFFERS)
