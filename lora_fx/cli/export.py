"""`lora-fx export`."""

from typing import Any

import click

from lora_fx.cli.options import data_option, model_argument, progress_option, trust_option, watched
from lora_fx.text import visible


@click.command("export", short_help="Write an adapted model for another program.")
@model_argument
@click.argument("adapter", type=click.Path())
@click.option("--target", required=True, help="The format; an unknown one lists them all.")
@click.option("-o", "--output", required=True, type=click.Path(), help="File or directory to write.")
@click.option("--adapter", "name", help="Name of the only one to write, where the directory holds several.")
@click.option("--verify", is_flag=True, help="Load it in its own client, and compare what both compute.")
@click.option("--set", "options", metavar="KEY=VALUE", multiple=True, help="Option of the target; may be repeated.")
@data_option
@progress_option
@trust_option
def command(
    model: str,
    adapter: str,
    target: str,
    output: str,
    name: str | None,
    verify: bool,
    options: tuple[str, ...],
    data: str | None,
    no_progress: bool,
    trust: bool,
) -> None:
    """Write MODEL with the ADAPTER of a directory for another program: whole, or not at all.

    MODEL needs its weights here.  The inputs that --verify compares on, and that some targets need, are those which the
    factory returns with the model, or transformers' own `dummy_inputs`.  Targets that choose codes by data
    (gguf_q4_0) take --data: a .safetensors file of the model's arguments, rows of each, or a factory of batches.
    """
    given = _read(options)  # a misspelt option is an error before torch is imported
    from lora_fx.api import export, load
    from lora_fx.cli.models.data import batches_of
    from lora_fx.cli.models.spec import load_model
    from lora_fx.exporters import target_named

    target_named(target)
    if data is not None:
        given["data"] = batches_of(data)
    built, inputs = load_model(model, weights=True, trust=trust)
    progress = watched(no_progress)
    tuned = load(built, adapter, progress=progress).eval()
    done = export(tuned, output, target, inputs, verify, adapter=name, progress=progress, **given)
    click.echo(visible(str(done), kept="\n"))  # paths are not wrapped


def _read(options: tuple[str, ...]) -> dict[str, Any]:
    """Return what stands behind each --set, read as YAML: numbers, true and false are what they look like."""
    import yaml

    given = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--set {text}: write KEY=VALUE")
        given[key] = yaml.safe_load(value)
    return given
