"""Where an adapted model lies in the model at hand: it may be that one, be held by it, or hold it as a part.

What a record says of an adapted model is by that model's own names.  For `pipe.unet.mid.q` in a pipeline whose adapted
unet knows the site as `mid.q`, names here begin with `unet.`, and names there with nothing.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lora_fx.adapters.attach import attached_to
from lora_fx.adapters.dicts import AdapterHome, holding_modules
from lora_fx.adapters.factors.lora import LoRAFactor
from lora_fx.adapters.factors.spec import AdapterSpec, ModelRecord
from lora_fx.models.wrappers import without_wrappers
from lora_fx.text import dotted


@dataclass(frozen=True, slots=True)
class Placed:
    """An adapted model, and how its names are those of the model at hand."""

    record: ModelRecord
    here: str
    """What its names begin with in the model at hand; empty, or a path and a dot."""
    there: str
    """What the names at hand begin with in the adapted model; empty unless the model at hand is a part of it."""
    whole: tuple[str, ...] = field(init=False)
    """What the names of all parameters begin with that are trained whole, in the adapted model."""
    biases: frozenset[str] = field(init=False)
    """Names there of the biases that are trained beside those of adapted sites."""

    def __post_init__(self) -> None:
        plan = self.record.plan
        whole = tuple(f"{without_wrappers(module.path)}." for module in plan.train)
        object.__setattr__(self, "whole", whole)
        object.__setattr__(self, "biases", frozenset(without_wrappers(bias.path) for bias in plan.biases))

    def recorded(self, name: str) -> str | None:
        """Return the adapted model's own name, without wrappers, for one at hand; None if it is not of that model."""
        plain = without_wrappers(name)
        return self.there + plain.removeprefix(self.here) if plain.startswith(self.here) else None

    def base(self) -> dict[str, Tensor]:
        """Return the caller's values that the record keeps, by their names at hand."""
        return {at: tensor for name, tensor in self.record.base.items() if (at := self._at_hand(name)) is not None}

    def trained(self) -> list[str]:
        """Return the paths at hand of the modules that are trained whole."""
        return [at for path in self.record.trained if (at := self._at_hand(path)) is not None]

    def _at_hand(self, name: str) -> str | None:
        is_here = name.startswith(self.there)
        return self.here + name.removeprefix(self.there) if is_here else None


def placed_in(model: nn.Module) -> list[Placed]:
    """Return every adapted model that is in this one, or that this one is a part of; none if nothing is adapted."""
    by_record: dict[int, tuple[ModelRecord, Counter[tuple[str, str]]]] = {}
    for path, spec in _first_specs(model):  # several at a site are of one model
        record = spec.record
        _, prefixes = by_record.get(id(record)) or by_record.setdefault(id(record), (record, Counter()))
        found = ("", "") if path == spec.path else _prefixes(without_wrappers(path), without_wrappers(spec.path))
        prefixes[found] += 1
    # a module that bears two names may stand first under another one here: what most say counts
    return [Placed(record, *prefixes.most_common(1)[0][0]) for record, prefixes in by_record.values()]


def _first_specs(model: nn.Module) -> Iterator[tuple[str, AdapterSpec]]:
    """Yield (path of the site, what it knows of itself) for the first adapter of every module that has some."""
    for path, module in holding_modules(model):
        spec = None if "lora_A" not in module._modules else _first_spec(module._modules["lora_A"])
        if spec is None or isinstance(module, AdapterHome):
            spec = next((adapter.spec for adapter in attached_to(module)), None)
        if spec is not None:
            yield (path if spec.path_is_owner else dotted(path, spec.parameter)), spec


def _first_spec(holder: nn.Module | None) -> AdapterSpec | None:
    """Return what the first of the factors in a `lora_A` knows of itself; None where that is not plain to see."""
    first = None if holder is None else next(iter(holder._modules.values()), None)
    return first.spec if isinstance(first, LoRAFactor) else None


def base_in(places: Iterable[Placed]) -> dict[str, Tensor]:
    """Return the values that the callers' models have of their own, by their names at hand."""
    return {name: tensor for place in places for name, tensor in place.base().items()}


def _prefixes(here: str, there: str) -> tuple[str, str]:
    """Return what is left of two paths, each with a dot at its end, without the end that they have in common.

    >>> _prefixes("unet.mid.q", "mid.q")
    ('unet.', '')
    """
    if here == there:
        return "", ""
    mine, its = here.split(".") if here else [], there.split(".") if there else []
    while mine and its and mine[-1] == its[-1]:
        mine.pop()
        its.pop()
    return "".join(f"{name}." for name in mine), "".join(f"{name}." for name in its)


def trained_names_among(named: Iterable[tuple[str, Tensor]], places: Sequence[Placed]) -> list[str]:
    """Return which names of parameters or buffers are of modules that are trained whole, or of trained biases."""
    if not any(place.whole or place.biases for place in places):
        return []
    return [name for name, _ in named if is_trained(name, places)]


def is_trained(name: str, places: Iterable[Placed]) -> bool:
    """Whether a parameter of that name belongs to a module that is trained whole, or is a bias under `bias: all`."""
    found = ((place, own) for place in places if (own := place.recorded(name)) is not None)
    return any(own.startswith(place.whole) or own in place.biases for place, own in found)
