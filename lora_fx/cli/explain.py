"""`lora-fx explain`."""

import click

from lora_fx.cli.options import model_argument, progress_option, rules_argument, rules_of, trust_option, watched
from lora_fx.cli.output import write


@click.command("explain")
@model_argument
@click.argument("path")
@rules_argument()
@progress_option
@trust_option
def command(model: str, path: str, rules: str, no_progress: bool, trust: bool) -> None:
    """Say why the site at PATH is adapted or not.

    PATH is a name in MODEL, a glob, or a module with sites in it; what each of the RULES says of it is listed.
    """
    read = rules_of(rules)  # a misspelt rule is an error before torch is imported
    from lora_fx.api import explain
    from lora_fx.cli.models.spec import load_model

    built, inputs = load_model(model, trust=trust)
    write(explain(built, path, read, inputs, progress=watched(no_progress)))
