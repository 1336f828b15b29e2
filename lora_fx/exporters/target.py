"""What every export target is, and what an adapted model has of what targets differ in."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from lora_fx.adapters.attach import Attached, all_attached, owner_path
from lora_fx.adapters.trained import added_rows
from lora_fx.planning.sites import CONVOLUTIONS
from lora_fx.rules.inits import pairs_of
from lora_fx.tuned.build import record_in

Refusal = tuple[str, str]
"""(path of the site, why the target cannot express it and what the nearest exact way is)."""
Ability = Literal["yes", "exact equivalent", "refused"]

FEATURES = {
    "linear": "`nn.Linear`",
    "conv1d": "transformers' `Conv1D`",
    "convolution": "convolutions",
    "embedding": "embeddings",
    "attention": "`in_proj_weight` of `nn.MultiheadAttention`",
    "parameter": "raw parameters",
    "experts": "banks of experts",
    "slices": "parts of a fused weight",
    "calls": "one adapter for each call of a module",
    "ranks": "several ranks",
    "alphas": "several scalings",
    "rslora": "rank-stabilised LoRA",
    "dora": "DoRA",
    "bias": "trained biases",
    "invocation": "adapters that act from an invocation on (aLoRA)",
    "train": "modules trained whole (`train:`)",
    "tokens": "rows of embeddings trained alone (`tokens:`)",
    "adapters": "several named adapters",
}
"""What an adapted model may have that a target can express or not; each target says of all of them."""


@dataclass(frozen=True, slots=True)
class Target:
    """One format that adapters, or adapted models, are written in."""

    name: str
    """What users call it: `gguf`."""
    writes: str
    """What is written, in a few words: `one file`, `a directory`."""
    client: str
    """The program that reads it: `llama.cpp`."""
    refused: Callable[[nn.Module], Iterator[Refusal]]
    """Yields what of an adapted model the target cannot express exactly; nothing is written if there is any."""
    write: Callable[..., None]
    """(tuned, path, **options) writes the model to the path, with what belongs to it beside; the model stays unchanged.

    The path is in a fresh directory: what was written moves to where the user wants it when all of it is there, and
    verified, under the same names.  With `needs_sample` it gets the keyword `sample` too.
    """
    verify: Callable[..., float] | None = None
    """(tuned, path, sample) loads what was written in the client, in a subprocess, and returns max |Δ| of the outputs.

    The model is in eval mode.  Where the client can switch the adapter off, the base's outputs are compared as well.
    """
    extra: str = ""
    """The extra of lora-fx that installs what writing (and verifying) needs."""
    needs: tuple[str, ...] = ()
    """Modules, as they are imported, that writing needs."""
    verify_needs: tuple[str, ...] = ()
    """Modules that verifying needs besides."""
    needs_sample: bool = False
    """Whether writing needs a sample of inputs; `verify` always does."""
    expresses: dict[str, Ability] = field(default_factory=dict)
    """For the table of capabilities: of each of FEATURES, whether it is written, and how."""
    options: dict[str, str] = field(default_factory=dict)
    """Keyword arguments that `write` takes, with a sentence about each."""
    verify_options: tuple[str, ...] = ()
    """Those of them that `verify` takes too."""
    several: Literal["one", "used", "each", "in use"] = "one"
    """Of several adapters it writes, at one weight: only one, which must be named; only one, which is named or in use;
    each; or the sum that is in use."""
    tolerance: float = 1e-5
    """Above which max |Δ| is a failure, for a float32 model whose outputs are of order one."""


# -- what an adapted model has of them


def at_one_weight(tuned: nn.Module) -> dict[str, str]:
    """Return the names of the adapters, `a, b`, by the path of each site that has several."""
    names: dict[str, dict[str, None]] = {}
    for path, adapter in all_attached(tuned):
        names.setdefault(path, {})[adapter.spec.adapter] = None
    return {path: ", ".join(found) for path, found in names.items() if len(found) > 1}


_SEVERAL: dict[str, Callable[[Attached], Hashable]] = {
    "ranks": lambda adapter: adapter.spec.lora.r * pairs_of(adapter.spec.lora.init),
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
    yield from (("bias", bias.path) for bias in record_in(tuned).plan.biases)
    yield from (("tokens", name) for name in dict.fromkeys(name for name, _, _ in added_rows(tuned)))


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
    held |= {
        "invocation": lora.invocation,
        "rslora": lora.rslora,
        "dora": lora.dora,
        "bias": adapter.trained_bias is not None,
    }
    yield from (feature for feature, has in held.items() if has)


def refusals(tuned: nn.Module, refused: Mapping[str, str]) -> Iterator[Refusal]:
    """Yield (path, reason) for all that the model has of the refused features, whose reasons are given."""
    yield from ((path, refused[feature]) for feature, path in features(tuned) if feature in refused)


def expressed(refused: Collection[str], exact: Collection[str] = ()) -> dict[str, Ability]:
    """Return what a target says of all features: refused, expressed by an exact equivalent, or as they are."""
    return {
        feature: "refused" if feature in refused else "exact equivalent" if feature in exact else "yes"
        for feature in FEATURES
    }
