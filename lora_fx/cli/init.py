"""`lora-fx init`."""

import os
from pathlib import Path

import click

from lora_fx.cli.options import STANDARD, model_argument, output_option, trust_option
from lora_fx.cli.output import write
from lora_fx.text import visible


@click.command("init")
@model_argument
@output_option
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
@trust_option
def command(model: str, output: str, force: bool, trust: bool) -> None:
    """Write a first rule file for MODEL, with comments.

    The rule in it adapts all linear layers of the blocks.  What the model has, what each rule would cost, and other
    rules to switch on stand beside it as comments.
    """
    path = None if output == STANDARD else Path(output)
    if path is not None:
        _refuse_present(path, force)
    from lora_fx.cli.models.spec import load_model
    from lora_fx.files.rulefile import draft_rules

    text = draft_rules(*load_model(model, trust=trust))
    if path is None:
        write(text.removesuffix("\n"), STANDARD, "yaml")
        return
    from lora_fx.files.atomic import write_files

    _refuse_present(path, force)  # it may have come in the meantime
    write_files({path.resolve(): text.encode()})
    name = visible(output)
    click.echo(f"{name} is written; see what it does: lora-fx plan {visible(model)} {name}")


def _refuse_present(path: Path, force: bool) -> None:
    """Raise a usage error for a file that would be lost, and for what is no file."""
    if path.exists() and not path.is_file():
        raise click.UsageError(f"{path} is no regular file")
    if os.path.lexists(path) and not force:
        raise click.UsageError(f"{path} is there already; --force overwrites it")
