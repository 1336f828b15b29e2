"""An adapted model → the tensors, the configuration and the metadata that are written for it."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_fx.adapters.adapt import read_in_graph
from lora_fx.adapters.attach import Attached, adapter_prefixes, all_attached, shown_parameters
from lora_fx.adapters.factors.kinds import ConvolutionA, EmbeddingA
from lora_fx.adapters.factors.lora import as_rows
from lora_fx.adapters.trained import added_rows, added_tensors, trained_owners
from lora_fx.errors import AdapterFileError
from lora_fx.files.adapter.biases import biases_by_key
from lora_fx.files.adapter.codec import encoded, has_other_border
from lora_fx.files.adapter.header import header_text
from lora_fx.files.adapter.names import (
    HEADS_OF_TASKS,
    METADATA_KEY,
    PREFIX,
    anchored,
    call_stem,
    factor_key,
    factor_names,
    only_for_lora_fx,
    parameter_stem,
    target_modules,
)
from lora_fx.files.adapter.site import SavedSite
from lora_fx.files.adapter.tokens import ROWS, SavedRows, saved_rows
from lora_fx.files.fingerprint import sample_values
from lora_fx.files.values import refuse_unwritable
from lora_fx.models.quantised import dense
from lora_fx.models.shards import whole
from lora_fx.models.swap import original_class
from lora_fx.models.tensors import dotted, get_tensor
from lora_fx.models.wrappers import module_at, without_wrappers
from lora_fx.rules.inits import pairs_of
from lora_fx.sources.installed import own_version
from lora_fx.tuned.build import record_in, whole_record_in
from lora_fx.tuned.several import biases_with, refuse_trained_together, trained_with
from lora_fx.tuned.switching import refuse_unknown


@dataclass(frozen=True, slots=True)
class Described:
    """One adapter, ready to be written."""

    name: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    metadata: dict[str, str]
    frozen: frozenset[str]
    """Keys of the tensors that training leaves as they are: A of LoRA-FA, of which the configuration says nothing."""


@dataclass(frozen=True, slots=True)
class _UsedAdapter:
    """An adapter of the model, and how the model uses its weight."""

    path: str
    adapter: Attached
    read: bool
    """Whether code reads the weight, instead of (or besides) calling the module that owns it."""
    beyond_peft: str
    """Why PEFT would compute something else with it; empty if it computes the same, or refuses it by itself."""


def describe(tuned: nn.Module, adapter: str | None = None) -> list[Described]:
    """Return what is to be written for every adapter of the model, or for one of them; the model stays unchanged.

    The first carries the names of the others; modules that several have trained together are in the first of these.

    Raises:
        ValueError: no adapter has the name.
    """
    groups: dict[str, list[_UsedAdapter]] = {}
    for used in _used_adapters(tuned):
        groups.setdefault(used.adapter.spec.adapter, []).append(used)
    added = record_in(tuned).added if any(trained_owners(tuned)) else {}  # the model's own values go with the others
    names = sorted(groups, key=lambda name: (name in added, name != "default", name))
    if adapter is not None:
        refuse_unknown([adapter], names)
        refuse_trained_together(tuned, adapter)
        names = [adapter]
    described = []
    held: set[str] = set()
    for name in names:
        parts = (_trained(tuned, name), [bias.path for bias in biases_with(tuned, record_in(tuned), name)])
        trained, biases = ([part for part in each if name in added or part not in held] for each in parts)
        held |= set() if name in added else {*trained, *biases}
        others = names[1:] if name == names[0] else []
        described.append(
            _describe(tuned, name, groups[name], _Beside(trained, biases, saved_rows(tuned, name)), others)
        )
    return described


@dataclass(frozen=True, slots=True)
class _Beside:
    """What else one adapter trains of the model."""

    modules: list[str]
    """Paths of those that are trained whole."""
    biases: list[str]
    """Names of the model's parameters that belong to no site."""
    rows: SavedRows


def _trained(tuned: nn.Module, name: str) -> list[str]:
    """Return the paths of the modules that an adapter trains whole."""
    trained = trained_with(tuned, record_in(tuned), name)
    if trained:
        whole_record_in(tuned)
    return [without_wrappers(module.path) for module in trained]


def beyond_peft(tuned: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (path, reason) for every site with which PEFT would compute something else, or which it cannot have."""
    yield from ((used.path, used.beyond_peft) for used in _used_adapters(tuned) if used.beyond_peft)
    for name in dict.fromkeys(whose for _, whose, _ in added_rows(tuned)):
        yield from saved_rows(tuned, name).beyond


def _used_adapters(tuned: nn.Module) -> Iterator[_UsedAdapter]:
    in_code = read_in_graph(tuned)
    places = Counter(id(child) for module in tuned.modules() for child in module._modules.values())
    claimed = tuple(f"{without_wrappers(path)}." for path in _claimed_too(tuned))
    invokes = _task_of(tuned) == "CAUSAL_LM"
    for site_path, adapter in all_attached(tuned):
        spec, path = adapter.spec, without_wrappers(site_path)
        read = spec.parameter in shown_parameters(adapter.owner)
        read = read or (spec.path_is_owner and dotted(path, "weight") in in_code)
        reason = _beyond_peft(adapter, read, is_shared=places[id(adapter.owner)] > 1)
        if spec.lora.invocation and not invokes:
            reason = "PEFT looks for an invocation in causal language models alone, and would leave the adapter out"
        if f"{path}.".startswith(claimed):
            reason = "PEFT would train it whole: its name ends like that of a module under `train:`"
        yield _UsedAdapter(path, adapter, read, reason)


def _beyond_peft(adapter: Attached, read: bool, is_shared: bool) -> str:
    if adapter.call is not None:
        return "each call has an adapter of its own"
    if is_shared:
        return "the module has several names, of which PEFT would adapt one"
    if not adapter.spec.path_is_owner:
        if adapter.magnitude is not None:
            return "it is DoRA of a raw parameter, which PEFT does not have"
        outside = adapter.spec.site.outside
        return "code outside of its module reads it, where PEFT would leave it as it is" if outside else ""
    if read:
        return "code reads its weight, which PEFT would leave as it is"
    if has_other_border(adapter.owner):
        return "PEFT would leave out the padding_mode and dilation of the convolution"
    return ZERO_ROW if adapter.magnitude is not None and _has_zero_row(adapter) else ""


ZERO_ROW = "a row of its weight is zero, and PEFT would divide it by its length"


def _has_zero_row(adapter: Attached) -> bool:
    """Whether a row of W + scaling · B A is zero, of a weight that is here (ZeRO-3 leaves a shape of [0])."""
    base = whole(adapter.base_weight)
    weight = as_rows(base, adapter.spec.site.layout) if base.dim() > 1 and not base.is_meta else None
    zero = None if weight is None else dense(weight).flatten(1).any(1).logical_not()
    if zero is None or not zero.any():
        return False
    return not bool((adapter.lora_B.matrix[zero] @ adapter.lora_A.matrix).any(1).all())


def _claimed_too(tuned: nn.Module) -> list[str]:
    """Return the paths of modules that PEFT takes for trained whole as well: it asks for the ends of their names."""
    trained = tuple(map(without_wrappers, record_in(tuned).trained))
    inside = tuple(f"{path}." for path in trained)
    own = adapter_prefixes(tuned)
    named = [(path, without_wrappers(path)) for path, _ in tuned.named_modules() if not f"{path}.".startswith(own)]
    return [path for path, name in named if name.endswith(trained) and not f"{name}.".startswith(inside)]


def _saved(used: _UsedAdapter, group: Sequence[_UsedAdapter]) -> SavedSite:
    """Return a site as its file holds it."""
    adapter, spec = used.adapter, used.adapter.spec
    lora_A, lora_B = encoded(adapter)
    bias = adapter.trained_bias
    groups = adapter.lora_A.groups if isinstance(adapter.lora_A, ConvolutionA) else 1
    return SavedSite(
        stem=_stem(used, [other.adapter for other in group if other.adapter.owner is adapter.owner]),
        path=used.path,
        lora=spec.lora,
        lora_A=_plain(lora_A),
        lora_B=_plain(lora_B),
        bias=None if bias is None else _plain(bias),
        magnitude=None if (lengths := adapter.lengths()) is None else _plain(lengths),
        embedding=isinstance(adapter.lora_A, EmbeddingA),
        noted=True,
        rule=spec.rule,
        op=spec.site.op,
        parameter="" if spec.path_is_owner else used.path,
        layout=spec.site.layout,
        read=used.read,
        slices=None if spec.slices is None else spec.slices.to_dict(),
        call=adapter.call,
        calls=spec.calls,
        file_ranks=max(1, len(spec.parts)) * groups * pairs_of(spec.lora.init),
    )


def _stem(used: _UsedAdapter, siblings: Sequence[Attached]) -> str:
    """Return what stands for a site in keys; the adapters of a module's raw parameters are nested in each other."""
    adapter = used.adapter
    if adapter.spec.path_is_owner:
        return used.path if adapter.call is None else call_stem(used.path, adapter.call)
    raw = [sibling.spec.parameter for sibling in siblings if not sibling.spec.path_is_owner]
    position = [name for name in adapter.owner._parameters if name in raw].index(adapter.spec.parameter)
    # inside of the layer that owns them, where that is adapted too
    is_layer_adapted = any(sibling.spec.path_is_owner for sibling in siblings)
    return parameter_stem(used.path.rpartition(".")[0], position, len(raw) + is_layer_adapted)


def _describe(
    tuned: nn.Module, name: str, group: Sequence[_UsedAdapter], beside: _Beside, others: list[str]
) -> Described:
    _refuse_mixed_dora(name, group)
    sites = [_saved(used, group) for used in group]
    tensors = {key: tensor for site in sites for key, tensor in site.tensors().items()}
    reasons = [*((used.path, used.beyond_peft) for used in group if used.beyond_peft), *beside.rows.beyond]
    beyond, trained = next((only_for_lora_fx(*reason) for reason in reasons), None), beside.modules
    claimed = _claimed_too(tuned) if trained and beyond is None else []  # PEFT fails where their tensors are missing
    tensors |= _module_tensors(tuned, name, [*trained, *claimed])
    tensors |= {key: _plain(rows).clone() for key, rows in beside.rows.tensors.items()}  # tied ones are one here
    tensors |= biases_by_key(_biases(tuned, name, beside.biases), [(used.path, used.adapter) for used in group])
    tensors = dict(sorted(tensors.items()))
    config = _config(tuned, sites, beside, beyond, {*trained, *map(without_wrappers, claimed)})
    record = record_in(tuned)
    plan = record.added.get(name, record.plan)
    content = {
        "lora_fx": own_version(),
        "adapter": name,
        "others": others,
        "trained": list(trained),
        "model": record.plan.model,
        "rules": plan.rules,
        "sites": {site.stem: site.note() for site in sites},
        "base": {used.path: sample_values(used.adapter.base_weight) for used in group},
        **({"tied": beside.rows.tied} if beside.rows.tied else {}),
    }
    refuse_unwritable(tensors)
    header = header_text(content, tensors)
    frozen = frozenset(factor_key(site.stem, factor_names(site.embedding)[0]) for site in sites if site.lora.lora_fa)
    return Described(name, tensors, config, {"format": "pt", METADATA_KEY: header}, frozen)


def _refuse_mixed_dora(name: str, group: Sequence[_UsedAdapter]) -> None:
    plain = [(used.path, "plain LoRA") for used in group if not used.adapter.spec.lora.dora]
    if plain and len(plain) < len(group):
        raise AdapterFileError(
            f"adapter '{name}'",
            "mixes DoRA and plain LoRA, for which PEFT's format has one switch",
            plain,
            "give the plain sites an adapter of their own (`adapter:` in the rules)",
        )


def _module_tensors(tuned: nn.Module, adapter: str, paths: Sequence[str]) -> dict[str, Tensor]:
    added = {without_wrappers(name): value for name, whose, value in added_tensors(tuned) if whose == adapter}
    own = _own_tensors(tuned, paths)
    return {PREFIX + name: _plain(added.get(name, tensor)).clone() for name, tensor in own.items()}


def _biases(tuned: nn.Module, adapter: str, names: Sequence[str]) -> dict[str, Tensor]:
    added = {name: value for name, whose, value in added_tensors(tuned) if whose == adapter}
    values = {name: added[name] if name in added else get_tensor(tuned, name) for name in names}
    return {without_wrappers(name): _plain(value).clone() for name, value in values.items() if value is not None}


def _own_tensors(tuned: nn.Module, paths: Sequence[str]) -> dict[str, Tensor]:
    return {
        without_wrappers(f"{path}.{name}"): tensor  # tied weights are in it under all names
        for path in paths
        for module in [module_at(tuned, path)]
        for own in [adapter_prefixes(module)]
        for name, tensor in module.state_dict().items()
        if not name.startswith(own)
    }


def _plain(tensor: Tensor) -> Tensor:
    return whole(tensor).to("cpu").contiguous()


def _config(
    tuned: nn.Module, sites: Sequence[SavedSite], beside: _Beside, beyond_peft: str | None, saved: Collection[str]
) -> dict[str, Any]:
    """Return PEFT's configuration; ranks and alphas that are not the most common go into anchored patterns."""
    loras = {site.name: site.lora for site in sites}
    rslora = all(lora.rslora for lora in loras.values())
    ranks = {site.name: site.rank for site in sites}
    alphas = {site.name: _alpha(site, rslora) for site in sites}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    parameters = sorted(site.parameter for site in sites if site.parameter and beyond_peft is None)
    own = adapter_prefixes(tuned)
    modules = [without_wrappers(name) for name, _ in tuned.named_modules() if not f"{name}.".startswith(own)]
    layers = target_modules((site.stem for site in sites if not site.parameter), modules)
    invocation = next(iter(loras.values())).invocation
    return {
        **({"alora_invocation_tokens": list(invocation)} if invocation else {}),
        "alpha_pattern": {anchored(name): value for name, value in sorted(alphas.items()) if value != alpha},
        "base_model_name_or_path": _name_of(tuned),
        "bias": "all" if beside.biases else "lora_only" if any(lora.bias for lora in loras.values()) else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        # PEFT has no dropout on raw parameters, and refuses to load them with one
        "lora_dropout": 0.0 if parameters else _most_common({name: lora.dropout for name, lora in loras.items()}),
        "modules_to_save": sorted(beside.modules) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {anchored(name): value for name, value in sorted(ranks.items()) if value != rank},
        "target_modules": layers if beyond_peft is None else beyond_peft,
        **({"target_parameters": parameters} if parameters else {}),
        "task_type": _told(_task_of(tuned), modules, saved),
        **({ROWS: beside.rows.indices} if beside.rows.indices else {}),
        "use_dora": any(lora.dora for lora in loras.values()),
        "use_rslora": rslora,
    }


def _alpha(site: SavedSite, rslora: bool) -> float:
    """Return the alpha that gives the site's scaling at the file's rank.

    PEFT has one switch for rank-stabilised scaling; where only some sites use it, their alpha says the same.
    """
    lora = site.lora
    if lora.rslora == rslora and (site.file_ranks == 1 or not rslora):
        return lora.alpha * site.file_ranks  # no rounding
    return lora.scaling * (site.rank**0.5 if rslora else site.rank)


def _most_common(values: Mapping[str, Any]) -> Any:
    """Return the most common value, the smallest of them in a tie: the same for the same adapter."""
    counted = Counter(values.values())
    return min(counted, key=lambda value: (-counted[value], value))


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""What PEFT calls the task of a transformers model, by the end of its class's name: its AutoPeftModels ask for it."""


def _task_of(tuned: nn.Module) -> str | None:
    name = original_class(tuned).__name__
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    generates = getattr(getattr(tuned, "config", None), "is_encoder_decoder", None)  # image models are called so too
    return None if generates is None or (task == "SEQ_2_SEQ_LM" and not generates) else task


def _told(task: str | None, modules: Iterable[str], saved: Collection[str]) -> str | None:
    """Return the task if PEFT can be told: it takes heads for trained whole then, and fails without their tensors."""
    heads = HEADS_OF_TASKS.get(task or "", ())
    return None if any(name.endswith(heads) and name not in saved for name in modules) else task


def _name_of(tuned: nn.Module) -> str | None:
    """Return where a transformers model came from, as PEFT notes it."""
    try:
        name = tuned.config._name_or_path  # type: ignore[union-attr]
    except AttributeError:
        return None
    return name if isinstance(name, str) and name else None
