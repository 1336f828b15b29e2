"""`lora-fx bench`."""

import click

from lora_fx.cli.options import (
    format_option,
    output_option,
    progress_option,
    rules_argument,
    rules_of,
    sizes_of,
    trust_option,
    watched,
)
from lora_fx.cli.output import write


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
@progress_option
@trust_option
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
    trust: bool,
) -> None:
    """Measure a training step of MODEL with adapters by RULES.

    Ratios are to the frozen base with the gradient of its input, which no step with adapters can beat; beside them
    stand full fine-tuning and, on request, PEFT.  MODEL is made with values, and needs inputs: those that its factory
    returns with it, its class's own, or --tokens.
    """
    sizes = sizes_of(tokens, "2x256")
    read = rules_of(rules)  # a misspelt rule is an error before torch is imported
    from lora_fx.bench.picture import report_html
    from lora_fx.bench.run import DTYPES, BenchOptions, bench
    from lora_fx.cli.models.runnable import runnable

    built, inputs = runnable(model, sizes, trust)
    options = BenchOptions(peer, 0 if no_time else rounds, threads, None if dtype is None else DTYPES[dtype])
    report = bench(built, read, inputs, options, watched(no_progress))
    forms = {"json": report.to_json, "html": lambda: report_html(report), "text": report.__str__}
    write(forms[form](), output, form)
