"""`lora-fx lint`."""

import click

from lora_fx.cli.options import rules_argument, rules_of
from lora_fx.cli.verbs import DIFFERS
from lora_fx.errors import RuleError
from lora_fx.text import count, visible


@click.command("lint")
@rules_argument(many=True)
@click.pass_context
def command(context: click.Context, rules: tuple[str, ...]) -> None:
    """Check rule files; needs neither a model nor torch."""
    from lora_fx.rules.lint import lint

    failed = False
    for name in rules:
        try:
            read, warnings = lint(rules_of(name))
        except RuleError as error:
            failed = True
            click.echo(str(error), err=True)
            continue
        for warning in warnings:
            click.echo(f"warning: {warning}", err=True)
        click.echo(f"{visible(name)}: {count(len(read.rules), 'rule')}, no problem")
    context.exit(DIFFERS if failed else 0)
