"""Adapters that fit a model → an adapted twin of it."""

from collections.abc import Sequence

from torch import nn

from lora_fx.discovery.study import Observed
from lora_fx.files.adapter import adding
from lora_fx.files.adapter.read import AdapterFile
from lora_fx.integrations.pretrained import take_over
from lora_fx.planning.decisions import Decisions
from lora_fx.tuned import build


def twin_of(
    model: nn.Module, files: Sequence[AdapterFile], seen: Observed, decisions: Decisions, passes: tuple[str, ...]
) -> nn.Module:
    """Return an adapted twin of the model with the values of the files; the model itself stays unchanged.

    Raises:
        RefusedError: a site that cannot be adapted, or where PEFT computes something else than its weight shows.
    """
    plan = seen.planned(decisions)
    twin = take_over(build.build(model, plan, start=False))
    adding.fill_all(twin, files, seen.inventory)
    build.install_graphs(twin, plan, passes)
    return build.finished(twin, plan, "auto")
