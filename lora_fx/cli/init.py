"""`lora-fx init`."""

import click

from lora_fx.cli.options import model_argument, output_option, trust_option
from lora_fx.cli.rulefile import refuse_present, write_rules


@click.command("init")
@model_argument
@output_option
@click.option("--task", help="Write the recipe for a task, such as instruction or classification.")
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
@trust_option
def command(model: str, output: str, task: str | None, force: bool, trust: bool) -> None:
    """Write a first rule file for MODEL, with comments.

    The rule in it adapts all linear layers of the blocks.  What the model has, what each rule would cost, and other
    rules to switch on stand beside it as comments.  With --task, rank, alpha and learning rate are those of current
    evidence, with their sources.
    """
    refuse_present(output, force)
    from lora_fx.cli.models.spec import load_model

    if task is None:
        from lora_fx.files.rulefile import draft_rules

        text = draft_rules(*load_model(model, trust=trust))
    else:
        from lora_fx.planning.recipes import check_task
        from lora_fx.training.recipe import recipe

        check_task(task)
        built, inputs = load_model(model, trust=trust)
        text = recipe(built, task, inputs).to_yaml()
    write_rules(text, output, force, model)
