"""`lora-fx watch`."""

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from lora_fx.cli.options import format_option, output_option
from lora_fx.cli.output import write
from lora_fx.text import visible

if TYPE_CHECKING:
    from lora_fx.training.lines import RecordLines
    from lora_fx.training.record import TrainingRecord

_CLEAR = "\x1b[H\x1b[2J\x1b[3J"


@click.command("watch", short_help="Show what a training run did, or does.")
@click.argument("run", type=click.Path())
@format_option("text", "json", "svg", "html")
@output_option
@click.option("--follow", is_flag=True, help="Show it anew whenever it grows, until interrupted.")
@click.option("--seconds", type=click.FloatRange(0.1), default=2.0, show_default=True, help="Between two looks.")
def command(run: str, form: str, output: str, follow: bool, seconds: float) -> None:
    """Show what a training run did, or does: its losses, and ‖ΔW‖ of its adapters.

    RUN is the file that lora_fx.Recorder, or a callback of the Trainer or of Lightning, writes.
    """
    from lora_fx.training.lines import RecordLines
    from lora_fx.training.record import recorded

    lines = RecordLines(run)
    try:
        if follow and not os.path.exists(run):
            click.echo(f"waiting for {visible(run)}", err=True)
            while not os.path.exists(run):
                time.sleep(seconds)
        _show(recorded(lines.read()), form, output)
        if follow:
            show_growth(lines, seconds, lambda record: _show(record, form, output))
    except KeyboardInterrupt:
        if not follow:
            raise
        click.echo(err=True)  # this is how it is meant to end


def _show(record: "TrainingRecord", form: str, output: str) -> None:
    forms: dict[str, Callable[[], str]] = {
        "text": record.__str__,
        "json": record.to_json,
        "svg": record.to_svg,
        "html": record.to_html,
    }
    write(forms[form](), output, form)


def show_growth(lines: "RecordLines", seconds: float, show: "Callable[[TrainingRecord], None]") -> None:
    """Show a record whenever it has grown: on a terminal in place of what is there, else below it."""
    from lora_fx.training.record import recorded

    seen = lines.size
    while True:
        time.sleep(seconds)
        record = recorded(lines.read())
        if lines.size != seen:
            seen = lines.size
            if sys.stdout.isatty():
                click.echo(_CLEAR, nl=False)
            show(record)
