"""From an adapted model to plain ones: merged, or the base as it was; and the base for a while."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from lora_fx.adapters.attach import SWITCH, adapted_owners, attached_to, detach, with_values
from lora_fx.adapters.dicts import KEPT, KEPT_TARGETS, AdapterDict
from lora_fx.adapters.layers import count_calls_anew, stop_counting
from lora_fx.adapters.placed import Placed, base_in, is_trained, placed_in
from lora_fx.adapters.rows import LOOKS
from lora_fx.adapters.selection import Selection, switched_off
from lora_fx.adapters.trained import choose_moved_buffers, forget, settle, trained_owners
from lora_fx.errors import RefusedError
from lora_fx.liveness.heads import late_modules
from lora_fx.models.between import unchanged
from lora_fx.models.dtypes import warn_of_narrowed
from lora_fx.models.fsdp import SHARDING
from lora_fx.models.modes import normal_tensors
from lora_fx.models.offload import keep_loaded
from lora_fx.models.overrides import with_class_forwards
from lora_fx.models.packed import (
    forget_quantiser,
    is_packed,
    lost_dtype,
    make_plain_,
    part_beside_codes,
    usual_dtype,
    warn_of_two_dtypes,
)
from lora_fx.models.quantised import forget_quantisation, is_quantised
from lora_fx.models.resharding import sharded_again
from lora_fx.models.shards import part_of
from lora_fx.models.swap import unswap
from lora_fx.models.tensors import borrowed, get_tensor, own_parameters, set_tensor
from lora_fx.models.ties import mark_untied, memory_of, says_tied, tied_names
from lora_fx.models.torch_internals import deepcopy, uncompiled_if_stale
from lora_fx.models.twin import is_meta, make_twin, twin_without
from lora_fx.models.wrappers import without_wrappers
from lora_fx.models.zero import of_zero3
from lora_fx.passes.contract import rewrite
from lora_fx.passes.editor import Editor
from lora_fx.passes.merge import Merge, check_mergeable, folded, used_at
from lora_fx.passes.remove import Remove, erase_lora_nodes
from lora_fx.passes.sites import lora_nodes
from lora_fx.progress.steps import step
from lora_fx.regions.install import regions, remade, uninstall
from lora_fx.tuned.asking import ask_layers, can_ask
from lora_fx.tuned.build import places_in, record_in
from lora_fx.tuned.heads import uninstall_late
from lora_fx.tuned.invoking import begin_call, end_call


@normal_tensors()
def removed(tuned: nn.Module) -> nn.Module:
    """Return the base model, bit-equal to the one given to `apply`; the adapted model stays unchanged.

    Raises:
        RefusedError: ZeRO-3 holds its parameters; or it was on the meta device, and what is trained had no values.
    """
    places = places_in(tuned)
    _refuse_lost(tuned, base_in(places))
    twin = _plain_twin(tuned, Remove())
    for owner in adapted_owners(twin):
        detach(owner)
    kept = {memory_of(parameter): parameter for parameter in twin.parameters()}
    for name, tensor in base_in(places).items():
        if not tensor.is_meta or is_meta(tuned):  # a buffer that came with values later is the base's
            set_tensor(twin, name, _like(twin, name, tensor, kept))
    for _, owner, _ in list(trained_owners(twin)):
        forget(owner)
    return _flagged(twin, tuned, places)


def _refuse_lost(tuned: nn.Module, base: Mapping[str, Tensor]) -> None:
    if lost := of_zero3(tuned):
        raise RefusedError("ZeRO-3 holds the parameters of this model", lost[:8], "lora_fx.disabled gives its base")
    places = placed_in(tuned)
    now = ((name, get_tensor(tuned, name)) for name, tensor in base.items() if tensor.is_meta)
    came = [(name, own) for name, own in now if own is not None and not own.is_meta]
    if gone := [(n, "is trained") for n, own in came if isinstance(own, nn.Parameter) or is_trained(n, places)]:
        raise RefusedError(
            "the model was on the meta device when it was adapted: what is trained has no values from before",
            gone,
            "load the base model anew",
        )


def merged(tuned: nn.Module, *, stays_plain: bool = True) -> nn.Module:
    """Return a plain model with every adapter folded into its base weight; the adapted model stays unchanged.

    Of a model that FSDP2 has sharded it is one that is sharded alike, and every process makes its part.

    Args:
        tuned: an adapted model.
        stays_plain: whether what was quantised is not quantised again: then transformers' notes of it are dropped.

    Raises:
        MergeError: naming every site whose merged weight would not be finite; nothing is merged then.
    """
    record_in(tuned)
    tuned = with_values(tuned)
    with unchanged(tuned):
        check_mergeable(tuned)
        model = _merged(tuned)
    if stays_plain:
        forget_quantiser(model)
        warn_of_two_dtypes(model, tuned)
    warn_of_narrowed(model)
    return model


@normal_tensors()
def _merged(tuned: nn.Module) -> nn.Module:
    places, twin = placed_in(tuned), _plain_twin(tuned, Merge())
    for place, copied in zip(places, placed_in(twin), strict=False):  # nothing is left of a GraphModule's
        copied.record.switch.everywhere = place.record.switch.now()
    settle(twin)
    owners = adapted_owners(twin)
    with step("merging", len(owners), "layers") as doing:
        for owner in owners:
            _merge_module(twin, owner, usual_dtype(twin))
            doing.advance()
    _untie(tuned, twin)
    base = set(map(without_wrappers, base_in(places)))
    names = [name for name, _ in twin.named_parameters(remove_duplicate=False) if without_wrappers(name) in base]
    own_parameters(twin, names, requires_grad=False)  # trained whole: the adapted model may go on training its own
    return _flagged(twin, tuned, places)


def _merge_module(twin: nn.Module, owner: nn.Module, dtype: torch.dtype | None) -> None:
    """Fold the adapters of one module of a twin into its weights; `dtype` is for one that has lost its own."""
    weights = {name: folded(used) for name, used in used_at(owner).items()}
    if any(is_quantised(one.base_weight) for one in attached_to(owner) if one.spec.parameter in weights):
        forget_quantisation(owner)
    keep_loaded(owner)
    detach(owner)
    for name, weight in weights.items():
        if is_packed(owner):
            weight = part_beside_codes(owner, weight.to(lost_dtype(owner, dtype)))
            owner = make_plain_(twin, owner, weight)
        setattr(owner, name, nn.Parameter(weight, requires_grad=False))


def _untie(tuned: nn.Module, twin: nn.Module) -> None:
    """Note in a transformers model that weights which were tied no longer are, or loading it would tie them again."""
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    apart = [names for names in tied_names(tuned) if len({id(parameters.get(name)) for name in names}) > 1]
    if apart or says_tied(twin):
        mark_untied(twin)


def _plain_twin(tuned: nn.Module, step: Merge | Remove) -> nn.Module:
    """Return a twin without regions and, for a GraphModule, with its graph rewritten."""
    in_modules = isinstance(step, Remove) and not isinstance(tuned, fx.GraphModule)
    twin = _without_factors(tuned) if in_modules else make_twin(tuned)
    _drop_hooks(twin)
    for _, module, _ in list(regions(twin)):
        uninstall(module)
    uninstall_late(twin)
    if isinstance(twin, fx.GraphModule) and next(lora_nodes(twin), None) is not None:
        rewrite(twin, step)
    return twin


def _without_factors(tuned: nn.Module) -> nn.Module:
    """Return a twin in which what holds adapters is empty: to copy them takes longer than all else."""
    inside = {id(m) for holder in tuned.modules() if isinstance(holder, AdapterDict) for m in holder.children()}
    inside |= {id(m) for module in tuned.modules() if id(module) in inside for m in module.modules()}
    modules = [module for module in tuned.modules() if id(module) not in inside]
    return twin_without(tuned, modules, lambda m: AdapterDict() if isinstance(m, AdapterDict) else None, freeze=True)


def _drop_hooks(twin: nn.Module) -> None:
    """Take off the hooks of our own."""
    hooks: tuple[dict[int, object], ...] = (twin._forward_pre_hooks, twin._forward_hooks)  # type: ignore[assignment]
    for table in hooks:
        for key, hook in list(table.items()):
            ours = (count_calls_anew, stop_counting, begin_call, end_call)
            if hook in ours or getattr(hook, LOOKS, False):
                del table[key]
                twin._forward_pre_hooks_with_kwargs.pop(key, None)
                twin._forward_hooks_with_kwargs.pop(key, None)
                twin._forward_hooks_always_called.pop(key, None)


def _like(twin: nn.Module, name: str, tensor: Tensor, kept: dict[object, nn.Parameter]) -> Tensor:
    """Return the base's tensor as what it was there: one parameter under all of its names, a buffer of its own."""
    own = dict(twin.named_parameters(remove_duplicate=False)).get(name)
    if own is None:
        return tensor.clone()
    memory = memory_of(tensor)
    if memory not in kept:
        value = tensor if SHARDING in vars(twin) else part_of(tensor, own)  # FSDP2's are sharded at the end
        kept[memory] = nn.Parameter(value, requires_grad=False)
    return kept[memory]


def _flagged(twin: nn.Module, tuned: nn.Module, places: Sequence[Placed]) -> nn.Module:
    """Give the parameters the flags of the caller's model, and instances the forwards of their own classes.

    What holds an adapted model keeps its own flags, and what is trained there gets memory of its own.
    """
    required = [(place, set(map(without_wrappers, place.record.requires_grad))) for place in places]
    trained = {without_wrappers(name) for name, p in tuned.named_parameters(remove_duplicate=False) if p.requires_grad}
    held = []
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        flags = [own in names for place, names in required if (own := place.recorded(name)) is not None]
        parameter.requires_grad_(any(flags))
        if not flags and without_wrappers(name) in trained:
            held.append(name)
    own_parameters(twin, held, requires_grad=True)
    twin.__dict__.pop(SWITCH, None)
    for module in twin.modules():
        unswap(module)
        for name in (KEPT, KEPT_TARGETS):  # who unpickles a base need not have lora_fx
            module.__dict__.pop(name, None)
    with_class_forwards(twin)
    return sharded_again(twin)


def show_base(tuned: nn.Module, places: Sequence[Placed]) -> dict[str, Tensor]:
    """Let a model show the base's values where no adapter is used, in place; return those that it cannot show so.

    They are a GraphModule's own.
    """
    changed = [owner for place in places for owner in choose_moved_buffers(tuned, place.record.switch, place.base())]
    if changed:
        remade(tuned, set(map(id, changed)))
    base = base_in(places)
    return {name: base[name] for name in base if isinstance(tuned, fx.GraphModule) and "." not in name}


@contextlib.contextmanager
def disabled(tuned: nn.Module) -> Iterator[None]:
    """Let the adapted model compute what its base computes; the same object, until the block ends.

    In this thread alone, but for GraphModules of which something has its adapter in a graph and nowhere else.
    """
    places = places_in(tuned)
    if can_ask(tuned):
        ask_layers(tuned)
    with contextlib.ExitStack() as stack:
        stack.enter_context(uncompiled_if_stale())
        stack.enter_context(borrowed(tuned, show_base(tuned, places)))
        for place in places:
            stack.enter_context(place.record.switch.chosen_here(Selection()))
        others = (*(region for _, _, region in regions(tuned)), *(late for _, late in late_modules(tuned)))
        stack.enter_context(switched_off(others))
        if isinstance(tuned, fx.GraphModule) and next(lora_nodes(tuned), None) is not None:
            stack.callback(setattr, tuned, "graph", tuned.graph)
            shell = fx.GraphModule(tuned, deepcopy(tuned.graph))
            erase_lora_nodes(Editor(shell))
            tuned.graph = shell.graph
        yield
