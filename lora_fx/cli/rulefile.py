"""Where rule files are written: over nothing that is there, whole or not at all."""

import os
from pathlib import Path

import click

from lora_fx.cli.options import STANDARD
from lora_fx.cli.output import write
from lora_fx.text import visible


def refuse_present(output: str, force: bool) -> None:
    """Raise a usage error for a file that would be lost, and for what is no file."""
    path = Path(output)
    if output == STANDARD:
        return
    if path.exists() and not path.is_file():
        raise click.UsageError(f"{path} is no regular file")
    if os.path.lexists(path) and not force:
        raise click.UsageError(f"{path} is there already; --force overwrites it")


def write_rules(text: str, output: str, force: bool, model: str) -> None:
    """Write the text of a rule file for a model to a file, or to the standard output."""
    if output == STANDARD:
        write(text.removesuffix("\n"), STANDARD, "yaml")
        return
    from lora_fx.files.atomic import write_files

    refuse_present(output, force)  # it may have come in the meantime
    write_files({Path(output).resolve(): text.encode()})
    name = visible(output)
    click.echo(f"{name} is written; see what it does: lora-fx plan {visible(model)} {name}")
