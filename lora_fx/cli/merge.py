"""`lora-fx merge`."""

import contextlib
from typing import Any

import click

from lora_fx.cli.options import data_option, format_option, progress_option, watched
from lora_fx.cli.output import show


@click.command("merge")
@click.argument("base", type=click.Path())
@click.argument("adapters", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="Directory to write; continued if unfinished.")
@click.option("--out-dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Default: each tensor's own.")
@click.option("--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the stochastic rounding.")
@click.option("--adapter", help="Of each directory the one of this name, where it has several for one weight.")
@click.option("--covariances", type=click.Path(), help="File by which codes are chosen (lora_fx.input_covariances).")
@data_option
@format_option("text", "json")
@click.option("--all", "everything", is_flag=True, help="Show every tensor, not only those that rounding hurt most.")
@progress_option
def command(
    base: str,
    adapters: tuple[str, ...],
    output: str,
    out_dtype: str | None,
    rounding: str,
    seed: int,
    adapter: str | None,
    covariances: str | None,
    data: str | None,
    form: str,
    everything: bool,
    no_progress: bool,
) -> None:
    """Fold adapters into a checkpoint on disk.

    BASE and ADAPTERS are directories and stay unchanged; the directory given by -o is written, in bounded memory.  With
    --data the codes of a quantised BASE, a model of transformers, are chosen by what its layers are given: a
    .safetensors file of the model's arguments, rows of each, or a factory of batches.  The model is loaded for that.
    """
    if data is not None and covariances is not None:
        raise click.UsageError("--data and --covariances are two ways of one thing: give one of them")
    from lora_fx.api import merge_checkpoint

    progress = watched(no_progress)
    how: Any = {"out_dtype": out_dtype, "rounding": rounding, "seed": seed, "adapter": adapter, "progress": progress}
    with contextlib.ExitStack() as files:
        if data is not None:
            from lora_fx.cli.models.data import covariances_on

            covariances = str(files.enter_context(covariances_on(data, base, adapters, adapter, progress)))
        report = merge_checkpoint(base, adapters, output, **how, covariances=covariances)
    show(report.to_json() if form == "json" else report.text(everything))
