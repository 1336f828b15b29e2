"""`lora-fx plan --mesh`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from lora_fx.cli.options import F, rules_of, sizes_of

_DTYPES = ("float32", "bfloat16", "float16")


def mesh_options(function: F) -> F:
    """Add the options that say on which mesh a step is counted, and what it is."""
    options: list[Callable[[F], F]] = [
        click.option(
            "--mesh", metavar="dp=N,tp=M,pp=P", help="Count what each device of a mesh takes in a step instead."
        ),
        click.option("--tokens", metavar="BxS", help="With --mesh: token ids, batch by length, of one device's step."),
        click.option(
            "--micro-batches", type=click.IntRange(1), help="With pp in --mesh: of a step; default: as many as stages."
        ),
        click.option("--dtype", type=click.Choice(_DTYPES), help="With --mesh: of the base.  Default: its own."),
        click.option(
            "--split", multiple=True, metavar="GLOB=STYLE", help="With --mesh: what tp splits, such as '**.up=colwise'."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@dataclass(frozen=True, slots=True)
class MeshOptions:
    """What was said of a mesh."""

    mesh: str | None
    tokens: str | None
    micro_batches: int | None
    dtype: str | None
    split: Sequence[str]

    def check(self, form: str, other: bool) -> None:
        """Refuse options of a mesh without one, and those that show a plan with one.

        Args:
            form: of the output.
            other: whether an option was given that shows a plan in some way.
        """
        if self.mesh is None and (self.tokens or self.micro_batches or self.dtype or self.split):
            raise click.UsageError("--tokens, --micro-batches, --dtype and --split are for --mesh")
        if self.mesh is not None and other:
            raise click.UsageError("--mesh shows a table of bytes, and no plan: leave out --all, --stat and --expect")
        if self.mesh is not None and form not in ("text", "json"):
            raise click.UsageError(f"--mesh is written as text or json, not as {form}")


def counted(model: str, rules: str | None, asked: MeshOptions, trust: bool) -> Any:
    """Return the budget of MODEL by RULES on a mesh."""
    if rules is None:
        raise click.UsageError("RULES are missing: --mesh runs the model, which a saved plan does not have")
    sizes = sizes_of(asked.tokens, "1x2048")
    from lora_fx.planning.budget import Mesh

    read = rules_of(rules)  # a misspelt rule is an error before torch is imported
    mesh = Mesh.of(asked.mesh or "")
    if mesh.pp == 1 and asked.micro_batches:
        raise click.UsageError("--micro-batches is for pp in --mesh")
    from lora_fx.cli.models.stepped import stepped
    from lora_fx.meshes.counting import budget

    built, inputs, dtype = stepped(model, sizes, asked.dtype, trust)
    styles = _styles(asked.split) or None
    return budget(built, read, inputs, mesh=mesh, tp_plan=styles, dtype=dtype, micro_batches=asked.micro_batches)


def _styles(split: Sequence[str]) -> dict[str, str]:
    wrong = [text for text in split if not all(text.rpartition("="))]
    if wrong:
        raise click.UsageError(f"--split {wrong[0]}: write GLOB=STYLE, such as '**.up=colwise'")
    return {name: style for name, _, style in (text.rpartition("=") for text in split)}
