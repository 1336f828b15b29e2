"""`lora-fx merge`."""

import click

from lora_fx.cli.options import format_option, progress_option
from lora_fx.cli.output import progress_bar, show


@click.command("merge")
@click.argument("base", type=click.Path())
@click.argument("adapters", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="Directory to write; continued if unfinished.")
@click.option("--out-dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Default: each tensor's own.")
@click.option("--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the stochastic rounding.")
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
    form: str,
    everything: bool,
    no_progress: bool,
) -> None:
    """Fold adapters into a checkpoint on disk.

    BASE and ADAPTERS are directories and stay unchanged; the directory given by -o is written, in bounded memory.
    """
    from lora_fx.files.checkpoint.streaming import MergeOptions, merge_files

    with progress_bar("merging", no_progress) as progress:
        report = merge_files(base, adapters, output, MergeOptions(out_dtype, rounding, seed), progress)
    show(report.to_json() if form == "json" else report.text(everything))
