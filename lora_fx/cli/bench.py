"""`lora-fx bench`."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import click

from lora_fx.cli.options import format_option, output_option, rules_argument, rules_of
from lora_fx.cli.output import write

if TYPE_CHECKING:
    from lora_fx.bench.report import BenchReport

_SIZES = re.compile(r"(\d+)[x×](\d+)")


@click.command("bench", short_help="Measure a training step of MODEL with adapters by RULES.")
@click.argument("model")
@rules_argument()
@click.option("--peer", type=click.Choice(["peft"]), help="Also measure PEFT, with the same adapters.")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="Of timing.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the base.  Default: its own.")
@click.option("--tokens", metavar="BxS", help="Random token ids, batch by length, in place of the model's own inputs.")
@click.option("--no-time", is_flag=True, help="Only count: FLOPs, bytes, calls; the same on every machine.")
@format_option("text", "json", "html")
@output_option
@click.option("--no-progress", is_flag=True, help="Show no progress bar.")
def command(
    model: str,
    rules: str,
    peer: str | None,
    rounds: int,
    threads: int,
    dtype: str | None,
    tokens: str | None,
    no_time: bool,
    form: str,
    output: str,
    no_progress: bool,
) -> None:
    """Measure a training step of MODEL with adapters by RULES.

    Ratios are to the frozen base with the gradient of its input, which no step with adapters can beat; beside them
    stand full fine-tuning and, on request, PEFT.  MODEL is made with values, and needs inputs: those that its factory
    returns with it, its class's own, or --tokens.
    """
    sizes = _sizes(tokens)
    report = _measured(model, rules, peer, 0 if no_time else rounds, threads, dtype, sizes, no_progress)
    write(_as(report, form), output, form)


def _sizes(tokens: str | None) -> tuple[int, int] | None:
    """Return (batch, length)."""
    if tokens is None:
        return None
    found = _SIZES.fullmatch(tokens)
    if found is None or 0 in map(int, found.groups()):
        raise click.UsageError(f"--tokens {tokens}: write batch and length as 2x256")
    return int(found[1]), int(found[2])


def _measured(
    model: str,
    rules: str,
    peer: str | None,
    rounds: int,
    threads: int,
    dtype: str | None,
    tokens: tuple[int, int] | None,
    hidden: bool,
) -> BenchReport:
    read = rules_of(rules)  # a misspelt rule is told before torch is imported
    from lora_fx.bench.run import DTYPES, BenchOptions, bench
    from lora_fx.cli.models.runnable import runnable

    built, inputs = runnable(model, tokens)
    options = BenchOptions(peer, rounds, threads, None if dtype is None else DTYPES[dtype])
    with click.progressbar(length=1, label="measuring", hidden=hidden, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        return bench(built, read, inputs, options, progress)


def _as(report: BenchReport, form: str) -> str:
    if form == "json":
        return report.to_json()
    if form == "html":
        from lora_fx.bench.picture import report_html

        return report_html(report)
    return str(report)
