"""`lora-fx schema`."""

import click


@click.command("schema")
def command() -> None:
    """Print the JSON schema of rule files, for editors."""
    from lora_fx.rules.schema import schema_text

    click.echo(schema_text(), nl=False)
