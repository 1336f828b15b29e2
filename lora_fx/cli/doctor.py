"""`lora-fx doctor`."""

import click

from lora_fx.cli.options import format_option, output_option
from lora_fx.cli.output import write
from lora_fx.cli.verbs import DIFFERS


@click.command("doctor")
@click.option("--quick", is_flag=True, help="Only look at versions; run nothing.")
@format_option("text", "json")
@output_option
@click.pass_context
def command(context: click.Context, quick: bool, form: str, output: str) -> None:
    """Show versions, and try whether adapting works.

    What the extras need is listed, and a tiny model is adapted, trained, saved and merged (exit 1 if that fails).
    """
    from lora_fx.cli.health import Health, HealthCheck, installed, trouble

    checks: tuple[HealthCheck, ...] = ()
    if not quick:
        from lora_fx.cli.models.selftest import tried

        checks = tried()
    health = Health(installed(), trouble(), checks)
    write(health.to_json() if form == "json" else str(health), output, form)
    context.exit(0 if health.is_well else DIFFERS)
