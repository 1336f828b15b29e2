"""From a plan to a twin with adapters: own values for what will be trained, an adapter beside each weight."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, fx, nn

from lora_fx.adapters.attach import (
    STATE,
    SWITCH,
    AdapterState,
    adapter_dtype,
    adapter_prefixes,
    all_attached,
    attach,
    has_call_factors,
    shown_parameters,
    spec_of,
)
from lora_fx.adapters.dicts import modules_beside
from lora_fx.adapters.factors.spec import ModelRecord
from lora_fx.adapters.layers import AdaptedLayer, AdaptedPacked, count_calls_anew, reading, stop_counting
from lora_fx.adapters.parallel import refuse_trained_parts
from lora_fx.adapters.placed import Placed, placed_in, trained_names_among
from lora_fx.adapters.rawweight.known_experts import BANKS, interface_of
from lora_fx.adapters.selection import Switch
from lora_fx.adapters.shown import ShowsAdapters
from lora_fx.adapters.tokenrows import TokenRows
from lora_fx.adapters.trained import TRAINED, add_rows, add_value, added_tensors, choose_values
from lora_fx.errors import RefusedError
from lora_fx.models.fsdp import SHARDING, parts_before
from lora_fx.models.packed import held_weight, is_packed
from lora_fx.models.quantised import is_quantised
from lora_fx.models.shards import is_sharded, part_of, split, unsharded, whole
from lora_fx.models.swap import original_class, swap, take_off
from lora_fx.models.tensors import get_tensor, own_parameters
from lora_fx.models.walking import all_buffers_of, all_names_of, all_parameters_of
from lora_fx.models.wrappers import module_at
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import PlannedSite
from lora_fx.progress.steps import step
from lora_fx.text import dotted


def adapt_sites(twin: nn.Module, plan: Plan, record: ModelRecord) -> None:
    """Adapt every site of a plan that has no adapter yet on the module that owns it, in place."""
    twin.__dict__[SWITCH] = record.switch
    known = {(path, name) for name in plan.adapters for path, _ in all_attached(twin, name)}
    kernels, in_code = read_by_kernels(twin), read_in_graph(twin)
    owners: dict[str, tuple[nn.Module, list[PlannedSite]]] = {}
    with torch.no_grad(), step("adapting", len(plan.adapted), "sites") as doing:
        for planned in plan.adapted:
            assert planned.lora is not None
            if (planned.path, planned.lora.adapter) not in known:
                path, _, name = planned.site.weight.rpartition(".")
                if path not in owners:
                    owners[path] = (module_at(twin, path), [])
                owner, sites = owners[path]
                weight = held_weight(owner, name)
                attach(owner, spec_of(planned, record, weight), weight)
                if planned.lora.invocation:
                    record.switch.invocations[planned.lora.adapter] = planned.lora.invocation
                sites.append(planned)
            doing.advance(planned.path)
    for path, (owner, sites) in owners.items():
        read = [
            planned
            for planned in sites
            if planned.site.read
            or planned.site.parameter
            or path in kernels
            or (in_code and planned.site.weight in in_code)
        ]
        names = [planned.site.weight.rpartition(".")[2] for planned in read]
        adapt(owner, names, path in kernels, record.switch)
    counts = count_calls_anew in twin._forward_pre_hooks.values()
    if not counts and any(planned.per_call and planned.calls for planned in plan.adapted):
        twin.register_forward_pre_hook(count_calls_anew)
        twin.register_forward_hook(stop_counting, always_call=True)


def read_in_graph(model: nn.Module) -> set[str]:
    """Return the names of what the graph of a GraphModule reads; none of another model."""
    if not isinstance(model, fx.GraphModule):
        return set()
    return {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}


def own_what_is_trained(model: nn.Module, twin: nn.Module, record: ModelRecord) -> None:
    """Give the twin values of its own for all else that training will change, and keep the model's in the record."""
    places = placed_in(twin)
    names = _trained_parameters(twin, places)
    held = {name: tensor for name in names if (tensor := get_tensor(twin, name)) is not None}
    codes = [name for name, tensor in held.items() if is_quantised(tensor) or not _takes_steps(tensor)]
    if codes:
        facts = [(name, "holds codes, not numbers") for name in codes]
        raise RefusedError("quantised weights cannot be trained whole (`train:`)", facts, "give them an adapter")
    owners = [(twin.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    refuse_trained_parts(twin, owners)
    record.base = {name: buffer.detach() for name, buffer in all_buffers_of(model)}
    before = {name: parameter for name in names if (parameter := get_tensor(model, name)) is not None}
    kept = {id(parameter): whole(parameter) for parameter in before.values()}  # what is tied stays so
    record.base |= {name: kept[id(parameter)] for name, parameter in before.items()}
    own_parameters(twin, names, requires_grad=True)
    record.switch.whole = tuple(dict.fromkeys((*names, *(rows.weight for rows in record.plan.tokens))))
    _choose_trained(twin, names, record, places)
    _give_rows(twin, record.plan, record.switch)


def _takes_steps(tensor: Tensor) -> bool:
    """Whether an optimizer can move such numbers; in float8 a step would be rounded away, and torch adds none."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _choose_trained(twin: nn.Module, names: Collection[str], record: ModelRecord, places: Sequence[Placed]) -> None:
    """Let modules show their trained values only where the adapters are used that were trained with them."""
    buffers, together = trained_names_among(all_buffers_of(twin), places), record.switch.names
    if not names and not buffers:
        return
    biased = {dotted(path, "bias"): (one.spec.adapter,) for path, one in all_attached(twin) if one.spec.lora.bias}
    for name in (*names, *buffers):
        path, _, last = name.rpartition(".")
        owner = twin.get_submodule(path)
        if not isinstance(owner, fx.GraphModule):
            choose_values(owner, record.switch, {last: record.base[name]}, {last: biased.get(name, together)})


def give_values(twin: nn.Module, plan: Plan, record: ModelRecord, adapter: str) -> list[nn.Module]:
    """Give an adapter that is added values of its own of all that its plan trains, as the base has them, in place.

    Returns the modules that have them.
    """
    copies: dict[int, Tensor] = {}
    changed: dict[nn.Module, None] = {}
    trained = _trained_by(twin, plan)
    refuse_trained_parts(twin, trained)
    before = parts_before(twin) if trained else {}
    for owner, name in trained:
        state = owner.__dict__.get(TRAINED)
        own = get_tensor(owner, name)
        if own is None:
            continue
        base = state.base[name] if state is not None and name in state.base else unsharded(own).detach()
        choose_values(owner, record.switch, {name: base}, {name: ()})
        if id(own) not in copies:  # what is tied stays so
            value = base.detach().to(own.device, own.dtype, copy=True)
            if SHARDING not in vars(twin):  # fully_shard will do so itself
                value = part_of(value, own)
            elif (held := before.get(id(own))) is not None:
                value = split(value, held.device_mesh, held.placements)
            copies[id(own)] = nn.Parameter(value) if isinstance(own, nn.Parameter) else value
        add_value(owner, adapter, name, copies[id(own)])
        changed[owner] = None
    changed |= dict.fromkeys(_give_rows(twin, plan, record.switch))
    more = [name for name, whose, value in added_tensors(twin) if whose == adapter and isinstance(value, nn.Parameter)]
    more += (rows.weight for rows in plan.tokens)
    record.switch.whole = tuple(dict.fromkeys((*record.switch.whole, *more)))
    return list(changed)


def _give_rows(twin: nn.Module, plan: Plan, switch: Switch) -> list[nn.Module]:
    """Give adapters the rows that a plan trains alone, as the base has them, in place; return what has them."""
    made: dict[tuple[str, str], TokenRows] = {}
    changed = []
    for planned in plan.tokens:
        path, _, name = planned.weight.rpartition(".")
        owner = twin.get_submodule(path)
        own = owner._parameters[name]
        assert own is not None
        if is_sharded(own):
            raise RefusedError(
                "rows of embeddings (`tokens:`) are not taken from shards", [(planned.weight, "sharded")]
            )
        state = owner.__dict__.get(TRAINED)
        base = state.base[name] if state is not None and name in state.base else own.detach()
        source = (planned.tied_to or planned.weight, planned.adapter)
        if source not in made:
            values = base[list(planned.ids)].to(own.device, adapter_dtype(own), copy=True)
            made[source] = TokenRows(planned.ids, nn.Parameter(values))
        add_rows(owner, planned.adapter, name, made[source])
        choose_values(owner, switch, {name: base}, {name: ()})
        changed.append(owner)
    return changed


def _trained_by(twin: nn.Module, plan: Plan) -> list[tuple[nn.Module, str]]:
    """Return (module, name) of each parameter and buffer that a plan trains beside A and B."""
    found: list[tuple[nn.Module, str]] = []
    for trained in plan.train:
        module = twin.get_submodule(trained.path)
        ours = adapter_prefixes(module)
        for path, owner in module.named_modules():
            if not f"{path}.".startswith(ours):
                found += [(owner, name) for name in (*owner._parameters, *owner._buffers)]
    for bias in plan.biases:
        path, _, name = bias.path.rpartition(".")
        found.append((twin.get_submodule(path), name))
    biased = [site.site.owner for site in plan.adapted if site.lora is not None and site.lora.bias]
    owners = map(twin.get_submodule, biased)
    return [*found, *((owner, "bias") for owner in owners if owner._parameters.get("bias") is not None)]


def trained_parameters(twin: nn.Module) -> list[str]:
    """Return the names of what is trained beside A and B: parameters of modules under `train:`, biases of rules."""
    return _trained_parameters(twin, placed_in(twin))


def _trained_parameters(twin: nn.Module, places: Sequence[Placed]) -> list[str]:
    whole = trained_names_among(all_parameters_of(twin), places)
    biases = [dotted(path, "bias") for path, adapter in all_attached(twin) if adapter.trained_bias is not None]
    return list(dict.fromkeys((*whole, *biases)))


def adapt(owner: nn.Module, reads: Collection[str], kernel: bool, switch: Switch) -> None:
    """Let the adapters that the module holds take part in what it computes, in place.

    Args:
        owner: a module with adapters.
        reads: names of the adapted parameters that code reads; where it is none, the module is called.
        kernel: whether torch's fused kernels read its weights in eval mode.
        switch: what the model uses.
    """
    shown_now = shown_parameters(owner)
    names = (*shown_now, *[name for name in reads if name not in shown_now]) if reads else shown_now
    if STATE not in owner.__dict__ or names != shown_now:
        are_experts = set(names) == set(BANKS) and interface_of(original_class(owner)) is not None
        take_off(owner, ShowsAdapters)
        swap(owner, reading(names, are_experts) if names else AdaptedPacked if is_packed(owner) else AdaptedLayer)
    owner.__dict__[STATE] = AdapterState(switch, kernel, 0 if has_call_factors(owner) else None)


_KERNELS = {nn.TransformerEncoderLayer: ("linear1", "linear2"), nn.MultiheadAttention: ("out_proj", "")}
"""Children of torch's own classes ("" is the class itself) whose weights are handed to a kernel in eval mode."""


def read_by_kernels(model: nn.Module) -> set[str]:
    """Return the paths of modules whose weights torch's own layers hand to fused kernels."""
    if not any(issubclass(kind, tuple(_KERNELS)) for kind in {type(module) for _, module in modules_beside(model)}):
        return set()
    return {
        dotted(path, name)
        for path, module in all_names_of(model)
        for kind, names in _KERNELS.items()
        if issubclass(original_class(module), kind)
        for name in names
    }
