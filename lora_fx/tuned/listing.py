"""What adapters a model has."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lora_fx.adapters.attach import Attached, all_attached, with_values
from lora_fx.adapters.norms import product_square, wide_matrices
from lora_fx.adapters.tokenrows import TokenRows
from lora_fx.adapters.trained import added_rows, parameters_of
from lora_fx.models.between import one_at_a_time
from lora_fx.models.dtypes import name_of_dtype
from lora_fx.models.wrappers import seen_through
from lora_fx.models.zero import numbers_in
from lora_fx.planning.render.notebook import InNotebook
from lora_fx.text import columns, count
from lora_fx.tuned.switching import names_of, switches_in


@dataclass(frozen=True, slots=True)
class ListedAdapter:
    """One adapter of a model."""

    name: str
    sites: int
    parameters: int
    """Of all that it trains: its factors and lengths, biases, rows, and modules of the model itself."""
    weight: float
    """Factor of ΔW in this thread; 0 if it is not used."""
    dtype: str
    norm: float | None
    """‖ΔW‖ over all its sites (Frobenius, of DoRA without its magnitude); None where no values are here."""
    trainable: bool
    """Whether any of its parameters requires a gradient."""
    token_rows: int = 0
    """Rows of embeddings and heads that it trains alone (`tokens:`); of tied weights once."""
    whole: int = 0
    """Parameters of the model itself that it trains: biases, modules under `train:`; of several for each."""

    @property
    def active(self) -> bool:
        """Whether this thread uses it."""
        return self.weight != 0


@dataclass(frozen=True, slots=True, repr=False)
class AdapterList(InNotebook):
    """What `list_adapters` returns: a sequence of `ListedAdapter`; `print` shows a table."""

    adapters: tuple[ListedAdapter, ...]

    def __iter__(self) -> Iterator[ListedAdapter]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    def __getitem__(self, name: str | int) -> ListedAdapter:
        if isinstance(name, int):
            return self.adapters[name]
        found = {adapter.name: adapter for adapter in self.adapters}
        return found[name]

    def __str__(self) -> str:
        return columns([_row(adapter) for adapter in self.adapters])

    def _heading(self) -> str:
        return ", ".join(f"{one.name}{' (used)' * one.active}" for one in self.adapters)


def _row(adapter: ListedAdapter) -> tuple[str, ...]:
    used = "not used" if not adapter.active else "used" if adapter.weight == 1 else f"used, {adapter.weight:g} of it"
    norm = "no values" if adapter.norm is None else f"‖ΔW‖ {adapter.norm:.4g}"
    sizes = count(adapter.sites, "site"), count(adapter.parameters, "parameter")
    more = [f"{count(adapter.token_rows, 'row')} of tokens"] if adapter.token_rows else []
    more += [f"{adapter.whole:,} of the model itself"] if adapter.whole else []
    more += [] if adapter.trainable else ["frozen"]
    return (adapter.name, used, *sizes, adapter.dtype, norm, ", ".join(more))


@one_at_a_time
def list_adapters(tuned: nn.Module) -> AdapterList:
    """Return what adapters the model has: sites, parameters, what this thread uses, dtype and ‖ΔW‖ of each.

    Of a model that FSDP2 shards every process asks.

    Raises:
        RefusedError: the model is not adapted.
    """
    tuned = seen_through(tuned)
    switches = switches_in(tuned)
    used = {name: weight for switch in switches for name, weight in switch.now().weights}
    valued = with_values(tuned)
    groups: dict[str, list[tuple[str, Attached]]] = {}
    for path, adapter in all_attached(valued):
        groups.setdefault(adapter.spec.adapter, []).append((path, adapter))
    for name in names_of(switches):  # also those that train rows or modules alone
        groups.setdefault(name, [])
    rows: dict[str, dict[int, TokenRows]] = {}
    for _, name, one in added_rows(valued):
        rows.setdefault(name, {})[id(one.rows)] = one
    return AdapterList(
        tuple(
            _listed(name, group, used.get(name, 0.0), [*parameters_of(valued, name)], rows.get(name, {}))
            for name, group in groups.items()
        )
    )


def _listed(
    name: str,
    group: list[tuple[str, Attached]],
    weight: float,
    own: list[nn.Parameter],
    rows: Mapping[int, TokenRows],
) -> ListedAdapter:
    whole = {id(one): one for one in own if id(one) not in rows}
    found = [*(parameter for _, adapter in group for parameter in adapter.parameters()), *whole.values()]
    found += [one.rows for one in rows.values()]
    parameters = list({id(parameter): parameter for parameter in found}.values())  # a site's bias is in both
    dtypes = dict.fromkeys(name_of_dtype(parameter.dtype) for parameter in parameters)
    return ListedAdapter(
        name=name,
        sites=len({path for path, _ in group}),
        parameters=sum(map(numbers_in, parameters)),
        weight=weight,
        dtype=", ".join(dtypes),
        norm=_norm([adapter for _, adapter in group]),
        trainable=any(parameter.requires_grad for parameter in parameters),
        token_rows=sum(len(one.ids) for one in rows.values()),
        whole=sum(map(numbers_in, whole.values())),
    )


def _norm(group: list[Attached]) -> float | None:
    if any(adapter.lora_A.weight.is_meta or adapter.lora_A.weight.numel() == 0 for adapter in group):
        return None
    with torch.no_grad():
        squares = [float(product_square(*wide_matrices(one))) * one.spec.scaling**2 for one in group]
    return math.sqrt(max(sum(squares), 0.0))
