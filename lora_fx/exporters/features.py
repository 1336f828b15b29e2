"""What an adapted model has of what targets differ in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping

from torch import nn

from lora_fx.adapters.attach import Attached, all_attached, owner_path
from lora_fx.exporters.target import FEATURES, Ability, Refusal
from lora_fx.planning.sites import CONVOLUTIONS
from lora_fx.tuned.build import record_in

_SEVERAL: dict[str, Callable[[Attached], Hashable]] = {
    "ranks": lambda adapter: adapter.spec.lora.r,
    "alphas": lambda adapter: adapter.spec.scaling,
    "adapters": lambda adapter: adapter.spec.adapter,
}


def features(tuned: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (feature, path of a site or module that has it) for all that the adapted model has of FEATURES."""
    sites = list(all_attached(tuned))
    for path, adapter in sites:
        yield _kind(tuned, path, adapter), path
        yield from ((feature, path) for feature in _traits(adapter))
    for feature, value_of in _SEVERAL.items():
        counted = Counter(value_of(adapter) for _, adapter in sites)
        usual = counted.most_common(1)[0][0]
        yield from ((feature, path) for path, adapter in sites if value_of(adapter) != usual)
    yield from (("train", path) for path in record_in(tuned).trained)


def _kind(tuned: nn.Module, path: str, adapter: Attached) -> str:
    above = tuned.get_submodule(owner_path(path, adapter).rpartition(".")[0])
    if isinstance(adapter.owner, nn.MultiheadAttention) or isinstance(above, nn.MultiheadAttention):
        return "attention"
    if adapter.spec.site.is_banked:
        return "experts"
    if not adapter.spec.path_is_owner:
        return "parameter"
    if adapter.spec.site.op in CONVOLUTIONS:
        return "convolution"
    if adapter.spec.site.op == "embedding":
        return "embedding"
    return "conv1d" if adapter.spec.site.layout == "in_out" else "linear"


def _traits(adapter: Attached) -> Iterator[str]:
    lora = adapter.spec.lora
    held = {"slices": adapter.spec.parts, "calls": adapter.call is not None}
    held |= {"rslora": lora.rslora, "dora": lora.dora, "bias": lora.bias}
    yield from (feature for feature, has in held.items() if has)


def refusals(tuned: nn.Module, refused: Mapping[str, str]) -> Iterator[Refusal]:
    """Yield (path, reason) for all that the model has of the refused features.

    Args:
        tuned: an adapted model.
        refused: reasons, by feature.
    """
    for feature, path in features(tuned):
        if feature in refused:
            yield path, refused[feature]


def expressed(refused: Collection[str], exact: Collection[str] = ()) -> dict[str, Ability]:
    """Return what a target says of all features: refused, expressed by an exact equivalent, or as they are."""
    kinds: dict[str, Ability] = {}
    for feature in FEATURES:
        kinds[feature] = "refused" if feature in refused else "exact equivalent" if feature in exact else "yes"
    return kinds
