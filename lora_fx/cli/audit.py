"""`lora-fx audit`."""

import click

from lora_fx.cli.options import format_option, output_option
from lora_fx.cli.output import write


@click.command("audit")
@click.argument("adapter", type=click.Path())
@format_option("text", "json")
@output_option
def command(adapter: str, form: str, output: str) -> None:
    """Show what stands out in an adapter's directory.

    Norms of what it adds, in how few sites and directions its energy is, and which sites differ from others of their
    kind: facts to look at, not a verdict.  All values are read and checked; no base model is needed.
    """
    from lora_fx.api import audit

    result = audit(adapter)
    write(result.to_json() if form == "json" else str(result), output, form)
