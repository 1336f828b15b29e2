"""`lora-fx allocate`."""

import click

from lora_fx.cli.options import (
    model_argument,
    output_option,
    progress_option,
    rules_argument,
    rules_of,
    trust_option,
    watched,
)
from lora_fx.cli.rulefile import refuse_present, write_rules


@click.command("allocate")
@model_argument
@rules_argument()
@click.option("--budget", type=int, help="Parameters of all adapters together; default: as many as by RULES.")
@click.option("--mean-r", type=float, help="In place of --budget, the mean rank over the sites.")
@click.option("--least", type=int, default=1, show_default=True, help="Rank that every site gets.")
@click.option("--most", type=int, help="Highest rank of a site; default: twice what an even spread would give it.")
@output_option
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
@progress_option
@trust_option
def command(
    model: str,
    rules: str,
    budget: int | None,
    mean_r: float | None,
    least: int,
    most: int | None,
    output: str,
    force: bool,
    no_progress: bool,
    trust: bool,
) -> None:
    """Write RULES for MODEL with ranks spread over its sites under a budget.

    Each next rank goes where its direction has most of its weight's spectrum.  MODEL is loaded with its weights.  A
    table that explains each rank stands in the file as comments.
    """
    refuse_present(output, force)
    read = rules_of(rules)  # a misspelt rule is an error before torch is imported
    from lora_fx.cli.models.spec import load_model
    from lora_fx.discovery.allocating import allocate

    built, inputs = load_model(model, weights=True, trust=trust)
    progress = watched(no_progress)
    found = allocate(built, read, inputs, budget=budget, mean_r=mean_r, least=least, most=most, progress=progress)
    write_rules(found.to_yaml(), output, force, model)
