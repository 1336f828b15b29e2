"""`lora-fx merge`."""

from typing import Any

import click

from lora_fx.cli.options import format_option, progress_option, watched
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
    form: str,
    everything: bool,
    no_progress: bool,
) -> None:
    """Fold adapters into a checkpoint on disk.

    BASE and ADAPTERS are directories and stay unchanged; the directory given by -o is written, in bounded memory.
    """
    from lora_fx.api import merge_checkpoint

    how: Any = {"out_dtype": out_dtype, "rounding": rounding, "seed": seed, "adapter": adapter}
    how["covariances"] = covariances
    report = merge_checkpoint(base, adapters, output, **how, progress=watched(no_progress))
    show(report.to_json() if form == "json" else report.text(everything))
