"""An adapted model → the tensors, the configuration and the metadata that are written for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

from lora_fx.adapters.adapt import read_in_graph
from lora_fx.adapters.attach import Attached, all_attached, shown_parameters
from lora_fx.adapters.factors.kinds import ConvolutionA, EmbeddingA
from lora_fx.adapters.layers import read_by_kernels
from lora_fx.errors import AdapterFileError
from lora_fx.files.adapter.codec import encoded, has_other_border
from lora_fx.files.adapter.header import SiteNote, header_text, note_of
from lora_fx.files.adapter.names import (
    METADATA_KEY,
    PREFIX,
    anchored,
    bias_key,
    call_stem,
    factor_key,
    factor_names,
    magnitude_key,
    only_for_lora_fx,
    parameter_stem,
    target_modules,
)
from lora_fx.files.fingerprint import sample_values
from lora_fx.models.tensors import dotted
from lora_fx.tuned.build import record_in


@dataclass(frozen=True, slots=True)
class Described:
    """One adapter, ready to be written."""

    name: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Filed:
    """One site's adapter, and how a file calls it."""

    stem: str
    """What stands for the site in keys."""
    path: str
    found: Attached
    is_parameter: bool
    """Whether PEFT would have it among `target_parameters`."""
    read: bool
    """Whether code reads the weight, instead of (or besides) calling the module that owns it."""
    beyond_peft: str
    """Why PEFT would compute something else with it; empty if it computes the same, or refuses it by itself."""

    @property
    def name(self) -> str:
        """What PEFT's patterns call the site."""
        return self.path if self.is_parameter else self.stem

    @property
    def ranks(self) -> int:
        """How many times r the file has ranks."""
        groups = self.found.lora_A.groups if isinstance(self.found.lora_A, ConvolutionA) else 1
        return max(1, len(self.found.spec.parts)) * groups

    @property
    def rank(self) -> int:
        return self.found.spec.lora.r * self.ranks

    def note(self) -> SiteNote:
        spec, adapter = self.found.spec, self.found
        return SiteNote(
            path=self.path,
            lora=spec.lora,
            rule=spec.rule,
            op=spec.site.op,
            parameter="" if spec.path_is_owner else self.path,
            layout=spec.site.layout,
            read=self.read,
            slices=None if spec.slices is None else spec.slices.to_dict(),
            call=adapter.call,
            calls=spec.calls,
            file_ranks=self.ranks,
        )


def describe(tuned: nn.Module) -> list[Described]:
    """Return what is to be written for every adapter of the model; the model stays unchanged.

    The first carries the modules that are trained whole, and the names of the others.
    """
    record = record_in(tuned)
    groups: dict[str, list[tuple[str, Attached]]] = {}
    for path, adapter in all_attached(tuned):
        groups.setdefault(adapter.spec.adapter, []).append((path, adapter))
    names = sorted(groups, key=lambda name: (name != "default", name))
    traits, described = _Traits.of(tuned), []
    for name in names:
        first = name == names[0]
        trained = record.trained if first else ()
        filed = _filed(groups[name], traits)
        described.append(_describe(tuned, name, filed, trained, names[1:] if first else []))
    return described


@dataclass(frozen=True, slots=True)
class _Traits:
    """What the model as a whole tells of its modules."""

    shared: set[int]
    """Identities of the modules that are children of several modules, or under several names."""
    uncalled: set[str]
    """Paths of the sites that no run has used: their weight shows itself adapted, whatever reads it."""
    in_code: set[str]
    """Names of what the graph of a GraphModule reads."""
    outside: set[str]
    """Paths of the sites whose weight other modules than its owner read."""

    @staticmethod
    def of(tuned: nn.Module) -> _Traits:
        places = Counter(id(child) for module in tuned.modules() for child in module._modules.values())
        shared = {module for module, number in places.items() if number > 1}
        planned = record_in(tuned).plan.adapted
        kernels = read_by_kernels(tuned)
        uncalled = {decision.path for decision in planned if not decision.site.read and decision.path not in kernels}
        outside = {decision.path for decision in planned if decision.site.outside}
        return _Traits(shared, uncalled, read_in_graph(tuned), outside)

    def read(self, path: str, adapter: Attached) -> bool:
        if adapter.spec.path_is_owner and dotted(path, "weight") in self.in_code:
            return True
        return adapter.spec.parameter in shown_parameters(adapter.owner) and path not in self.uncalled

    def beyond_peft(self, path: str, adapter: Attached) -> str:
        if adapter.call is not None:
            return "each call has an adapter of its own"
        if id(adapter.owner) in self.shared:
            return "the module has several names, of which PEFT would adapt one"
        if not adapter.spec.path_is_owner:
            elsewhere = "code outside of its module reads it, where PEFT would leave it as it is"
            return elsewhere if path in self.outside else ""
        if self.read(path, adapter):
            return "code reads its weight, which PEFT would leave as it is"
        if has_other_border(adapter.owner):
            return "PEFT would leave out the padding_mode and dilation of the convolution"
        return ""


def beyond_peft(tuned: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (path, reason) for every site with which PEFT would compute something else, or which it cannot have."""
    traits = _Traits.of(tuned)
    for path, adapter in all_attached(tuned):
        reason = traits.beyond_peft(path, adapter)
        if reason:
            yield path, reason


def _filed(sites: Sequence[tuple[str, Attached]], traits: _Traits) -> list[_Filed]:
    """Return the sites with what stands for each in the file."""
    together = Counter(id(adapter.owner) for _, adapter in sites if not adapter.spec.path_is_owner)
    layers = {id(adapter.owner) for _, adapter in sites if adapter.spec.path_is_owner}
    filed = []
    for path, adapter in sites:
        raw = not adapter.spec.path_is_owner
        if raw:  # inside of the layer that owns it, where that is adapted too
            number = together[id(adapter.owner)] + (id(adapter.owner) in layers)
            stem = parameter_stem(path.rpartition(".")[0], _position(adapter, sites), number)
        else:
            stem = path if adapter.call is None else call_stem(path, adapter.call)
        filed.append(_Filed(stem, path, adapter, raw, traits.read(path, adapter), traits.beyond_peft(path, adapter)))
    return filed


def _position(adapter: Attached, sites: Sequence[tuple[str, Attached]]) -> int:
    """Return which of the adapted raw parameters of its module this one is, in the order of registration."""
    mine = {other.spec.parameter for _, other in sites if other.owner is adapter.owner and not other.spec.path_is_owner}
    return [name for name in adapter.owner._parameters if name in mine].index(adapter.spec.parameter)


def _describe(
    tuned: nn.Module, name: str, sites: Sequence[_Filed], trained: Sequence[str], others: list[str]
) -> Described:
    _refuse_mixed_dora(name, sites)
    tensors = dict(sorted({**_site_tensors(sites), **_module_tensors(tuned, trained)}.items()))
    config = _config(tuned, sites, trained)
    content = {
        "lora_fx": _version(),
        "adapter": name,
        "others": others,
        "trained": list(trained),
        "model": record_in(tuned).plan.model,
        "rules": record_in(tuned).plan.rules,
        "sites": {site.stem: note_of(site.note()) for site in sites},
        "base": {site.path: sample_values(site.found.base_weight) for site in sites},
    }
    header = header_text(content, tensors)
    return Described(name, tensors, config, {"format": "pt", METADATA_KEY: header})


def _refuse_mixed_dora(name: str, sites: Sequence[_Filed]) -> None:
    plain = [(site.path, "plain LoRA") for site in sites if not site.found.spec.lora.dora]
    if plain and len(plain) < len(sites):
        raise AdapterFileError(
            f"adapter '{name}'",
            "mixes DoRA and plain LoRA, for which PEFT's format has one switch",
            plain,
            "give the plain sites an adapter of their own (`adapter:` in the rules)",
        )


def _version() -> str:
    try:
        return version("lora-fx")
    except PackageNotFoundError:  # a checkout on sys.path that was never installed
        return "unknown"


def _site_tensors(sites: Sequence[_Filed]) -> dict[str, Tensor]:
    tensors = {}
    for site in sites:
        adapter = site.found
        names = factor_names(isinstance(adapter.lora_A, EmbeddingA))
        for name, factor in zip(names, encoded(adapter), strict=True):
            tensors[factor_key(site.stem, name)] = _plain(factor)
        if adapter.magnitude is not None:
            tensors[magnitude_key(site.stem)] = _plain(adapter.magnitude.weight)
        if adapter.trained_bias is not None:
            tensors[bias_key(site.path)] = _plain(adapter.trained_bias)
    return tensors


def _module_tensors(tuned: nn.Module, trained: Sequence[str]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{path}.{name}": _plain(tensor)
        for path in trained
        for name, tensor in tuned.get_submodule(path).state_dict().items()
    }


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()


def _config(tuned: nn.Module, sites: Sequence[_Filed], trained: Sequence[str]) -> dict[str, Any]:
    """Return PEFT's configuration; ranks and alphas that are not the most common go into anchored patterns."""
    loras = {site.name: site.found.spec.lora for site in sites}
    rslora = all(lora.rslora for lora in loras.values())
    ranks = {site.name: site.rank for site in sites}
    alphas = {site.name: _alpha(site, rslora) for site in sites}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    beyond = next((site for site in sites if site.beyond_peft), None)
    parameters = sorted(site.path for site in sites if site.is_parameter and beyond is None)
    modules = (name for name, _ in tuned.named_modules() if not _is_of_adapter(name))
    layers = target_modules((site.stem for site in sites if not site.is_parameter), modules)
    return {
        "alpha_pattern": {anchored(name): value for name, value in sorted(alphas.items()) if value != alpha},
        "base_model_name_or_path": _name_of(tuned),
        "bias": "lora_only" if any(lora.bias for lora in loras.values()) else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        # PEFT has no dropout on raw parameters, and refuses to load them with one
        "lora_dropout": 0.0 if parameters else _most_common({name: lora.dropout for name, lora in loras.items()}),
        "modules_to_save": sorted(trained) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {anchored(name): value for name, value in sorted(ranks.items()) if value != rank},
        "target_modules": layers if beyond is None else only_for_lora_fx(beyond.path, beyond.beyond_peft),
        **({"target_parameters": parameters} if parameters else {}),
        "task_type": None,
        "use_dora": any(lora.dora for lora in loras.values()),
        "use_rslora": rslora,
    }


def _alpha(site: _Filed, rslora: bool) -> float:
    """Return the alpha that gives the site's scaling at the file's rank.

    PEFT has one switch for rank-stabilised scaling; where only some sites use it, their alpha says the same.
    """
    lora = site.found.spec.lora
    if site.ranks == 1:
        return lora.alpha if lora.rslora == rslora else lora.scaling * lora.r
    exact = lora.alpha * site.ranks if lora.rslora == rslora and not rslora else None
    return exact if exact is not None else lora.scaling * (site.rank**0.5 if rslora else site.rank)


def _is_of_adapter(name: str) -> bool:
    return ".lora_" in f".{name}" or "_lora.lora_" in name


def _most_common(values: Mapping[str, Any]) -> Any:
    """Return the most common value, the smallest of them in a tie: the same for the same adapter."""
    counted = Counter(values.values())
    return min(counted, key=lambda value: (-counted[value], value))


def _name_of(tuned: nn.Module) -> str | None:
    """Return where a transformers model came from, as PEFT notes it."""
    try:
        name = tuned.config._name_or_path  # type: ignore[union-attr]
    except AttributeError:
        return None
    return name if isinstance(name, str) and name else None
