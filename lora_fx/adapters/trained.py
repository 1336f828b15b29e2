"""What is trained of the model itself (modules under `train:`, biases, rows), and which values a call computes with.

The module's own table holds the values of the adapters that were trained with it, so no key of the base changes; the
values of adapters that were added stand beside them, in `lora_trained.<adapter>.<name>`, and so do rows that any
adapter trains alone, in `lora_trained.<adapter>.<name>.rows`.  A call reads base + Σ weight · (value - base) over the
adapters that are used; of one adapter that is its value itself, of none the base's.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lora_fx.adapters.dicts import AdapterDict, modules_beside
from lora_fx.adapters.reads import is_distributing, take_over, wants_parameter
from lora_fx.adapters.selection import Selection, Switch
from lora_fx.adapters.tokenrows import TokenRows, embedded, looks_up_plainly, multiplied, with_rows
from lora_fx.errors import RefusedError
from lora_fx.models.shards import part_of
from lora_fx.models.swap import MADE_BY, Swapped, original_class, swap, take_off
from lora_fx.models.walking import as_usual
from lora_fx.models.wrappers import inside, module_at
from lora_fx.text import dotted

TRAINED = "lora_fx_trained"
"""Attribute of a module of which something is trained: its TrainedState."""
VALUES = "lora_trained"
"""Child of such a module: the values of adapters that were added, by their names."""
_NAMES = "lora_fx_chosen"


@dataclass(slots=True)
class TrainedState:
    """What a module has several values of."""

    switch: Switch
    base: dict[str, Tensor]
    """The base's value of each such parameter or buffer."""
    owners: dict[str, tuple[str, ...] | None]
    """The adapters to which the module's own value belongs; None: to whatever is used, as buffers that have moved."""
    spare: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the base's buffers, for calls in train mode: they write to them."""

    def renamed(self, names: Mapping[str, str]) -> None:
        """Call adapters otherwise."""
        for name, owners in self.owners.items():
            self.owners[name] = None if owners is None else tuple(names.get(owner, owner) for owner in owners)


class ChoosesValues(Swapped, nn.Module):
    """Mixin for a module of which something is trained: it shows the values of the adapters that are used."""

    def _replicate_for_data_parallel(self) -> Any:  # other threads will run the replica
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        state: TrainedState = self.__dict__[TRAINED]
        replica.__dict__[TRAINED] = TrainedState(state.switch.fixed(), state.base, state.owners, state.spare)
        return replica

    @as_usual
    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        if memo is None and VALUES in self._modules and is_distributing(sys._getframe(1)):
            facts = [(name, "has values beside the model's own") for name in chosen_names(self)]
            raise RefusedError("what several adapters train of a module cannot be sharded with it", facts)
        return super().named_modules(memo, prefix, remove_duplicate)


@functools.cache
def choosing(names: tuple[str, ...], are_flat: bool, forward: str = "") -> type:
    """Return the mixin for a module that shows the chosen values of these parameters and buffers.

    Args:
        names: of the parameters and buffers.
        are_flat: whether it keeps them in a list besides, as LSTMs do.
        forward: of a module with rows that are trained alone, the class whose forward it has: "Embedding", "Linear".
    """
    body: dict[str, Any] = {name: property(_reader(name), take_over(name)) for name in names}
    if forward:
        body["forward"] = _embed if forward == "Embedding" else _multiply
    if are_flat:
        body["_flat_weights"] = property(_flat_weights, lambda owner, value: None)
    made_by = (choosing, (names, are_flat, forward))
    return type("ChosenValues", (ChoosesValues,), {**body, _NAMES: names, MADE_BY: made_by})


def _reader(name: str) -> Callable[[nn.Module], Tensor | None]:
    def read(owner: nn.Module) -> Tensor | None:
        own = owner._parameters[name] if name in owner._parameters else owner._buffers[name]
        state: TrainedState | None = owner.__dict__.get(TRAINED)
        if own is None or state is None or wants_parameter():
            return own
        return value_of(owner, state, name, own, state.switch.for_call())

    return read


def _flat_weights(owner: Any) -> list[Tensor | None]:
    return [getattr(owner, name, None) for name in owner._flat_weights_names]


def _embed(self: Any, input: Tensor) -> Tensor:
    one = _only_rows(self)
    if one is None or not looks_up_plainly(self, one):
        return nn.Embedding.forward(self, input)
    return embedded(self, input, one)


def _multiply(self: Any, input: Tensor) -> Tensor:
    one = _only_rows(self)
    return nn.Linear.forward(self, input) if one is None else multiplied(self, input, one)


def _only_rows(owner: nn.Module) -> TokenRows | None:
    """Return the rows of one adapter, as it was trained, where they alone make the weight of a call another one."""
    state: TrainedState | None = owner.__dict__.get(TRAINED)
    if state is None or state.owners.get("weight") != ():
        return None
    selection = state.switch.for_call()
    rows = _rows_used(owner, selection, "weight")
    if len(rows) != 1 or rows[0][1] != 1:
        return None
    for adapter, _ in selection.weights:
        if added_value(owner, adapter, "weight") is not None:
            return None
    return rows[0][0]


def _rows_used(owner: nn.Module, selection: Selection, name: str) -> list[tuple[TokenRows, float]]:
    """Return the rows of a module's parameter that are used, each with its share."""
    found = []
    for adapter, share in selection.weights:
        one = rows_at(owner, adapter, name)
        if one is not None:  # torch.compile follows no `:=`
            found.append((one, share))
    return found


def value_of(owner: nn.Module, state: TrainedState, name: str, own: Tensor, selection: Selection) -> Tensor:
    """Return what a module computes with as its parameter or buffer of that name."""
    whole = _whole_value(owner, state, name, own, selection)
    rows = _rows_used(owner, selection, name)
    return with_rows(whole, _base_value(owner, state, name, own), rows) if rows else whole


def _whole_value(owner: nn.Module, state: TrainedState, name: str, own: Tensor, selection: Selection) -> Tensor:
    """Return the same without rows that are trained alone."""
    owners, used = state.owners[name], selection.weights
    terms = []
    for adapter, share in used:
        other = added_value(owner, adapter, name)
        if other is not None:
            terms.append((other, share))
    if owners is None and not terms:
        return own if used or selection.rows is not None else _base_value(owner, state, name, own)
    is_mine = [share for adapter, share in used if adapter in (owners or ())]
    if is_mine:
        terms.append((own, is_mine[0]))
    if len(terms) == 1 and terms[0][1] == 1:
        return terms[0][0]
    base = total = _base_value(owner, state, name, own)
    for value, share in terms:
        total = total + share * (value - base)
    return total


def add_value(owner: nn.Module, adapter: str, name: str, value: Tensor) -> None:
    """Give an adapter a value of its own of a module's parameter or buffer, in place."""
    holder = owner._modules.get(VALUES)
    if holder is None:
        holder = owner._modules[VALUES] = AdapterDict()
    values = holder._modules.get(adapter)
    if values is None:
        values = holder._modules[adapter] = nn.Module()
    table: dict[str, Any] = values._parameters if isinstance(value, nn.Parameter) else values._buffers
    table[name] = value
    if name in owner._non_persistent_buffers_set:
        values._non_persistent_buffers_set.add(name)


def add_rows(owner: nn.Module, adapter: str, name: str, rows: TokenRows) -> None:
    """Give an adapter rows of its own of a module's parameter, in place."""
    holder = owner._modules.setdefault(VALUES, AdapterDict())
    assert holder is not None
    holder._modules.setdefault(adapter, nn.Module())._modules[name] = rows  # type: ignore[union-attr]


def rows_at(owner: nn.Module, adapter: str, name: str) -> TokenRows | None:
    """Return the rows of a module's parameter that an adapter trains alone, if it does."""
    holder = owner._modules.get(VALUES)
    values = None if holder is None else holder._modules.get(adapter)
    rows: Any = None if values is None else values._modules.get(name)
    return rows  # type: ignore[no-any-return]


def added_rows(model: nn.Module) -> Iterator[tuple[str, str, TokenRows]]:
    """Yield (name of the model's parameter, adapter, rows) of rows that are trained alone, tied ones by each name."""
    for path, owner, _ in trained_owners(model):
        holder = owner._modules.get(VALUES)
        for adapter, values in () if holder is None else holder._modules.items():
            assert values is not None
            for name, rows in values._modules.items():
                assert isinstance(rows, TokenRows)
                yield dotted(path, name), adapter, rows


def added_tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (name of the model's tensor, adapter, value) of all that added adapters have of the model itself."""
    for path, owner, _ in trained_owners(model):
        holder = owner._modules.get(VALUES)
        for adapter, values in () if holder is None else holder._modules.items():
            assert values is not None
            for name, value in (*values._parameters.items(), *values._buffers.items()):
                if value is not None:
                    yield dotted(path, name), adapter, value


def parameters_of(model: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    """Yield what an adapter trains of the model itself: the model's own parameters, or those that were added for it."""
    for _, owner, state in trained_owners(model):
        for name, owners in state.owners.items():
            own = owner._parameters.get(name)
            value = own if owners and adapter in owners else added_value(owner, adapter, name)
            if isinstance(value, nn.Parameter):
                yield value
            if (rows := rows_at(owner, adapter, name)) is not None:
                yield rows.rows


def trained_names(model: nn.Module) -> set[str]:
    """Return the names of the model's parameters that some adapter trains."""
    own = {dotted(path, name) for path, _, state in trained_owners(model) for name, o in state.owners.items() if o}
    return own | {name for found in (added_tensors(model), added_rows(model)) for name, _, _ in found}


def added_value(owner: nn.Module, adapter: str, name: str) -> Tensor | None:
    """Return the value that an adapter which was added has of a parameter or buffer, if it has one."""
    holder = owner._modules.get(VALUES)
    values = None if holder is None else holder._modules.get(adapter)
    if values is None:
        return None
    return values._parameters[name] if name in values._parameters else values._buffers.get(name)


def _base_value(owner: nn.Module, state: TrainedState, name: str, own: Tensor) -> Tensor:
    if state.owners[name] == () and name in owner._parameters:
        return own  # no adapter has changed it
    base = state.base[name]
    if base.device != own.device or base.dtype != own.dtype:  # the adapted model was moved since
        base = base.to(own.device, own.dtype)
    base = base if torch.compiler.is_compiling() else part_of(base, own)
    if name not in owner._buffers or not owner.training:
        return base
    if name not in state.spare or state.spare[name].device != base.device:
        state.spare[name] = base.clone()
    return state.spare[name]


def choose_values(
    owner: nn.Module, switch: Switch, base: Mapping[str, Tensor], owners: Mapping[str, tuple[str, ...] | None]
) -> None:
    """Let a module show the values of the adapters that are used, in place; of what it did before, it goes on to.

    Args:
        owner: a module with parameters or buffers of these names.
        switch: what the model uses.
        base: the base's values, by name.
        owners: the adapters to which the module's own values belong, by name.
    """
    state: TrainedState = owner.__dict__.setdefault(TRAINED, TrainedState(switch, {}, {}))
    new = {name: base[name] for name in base if name not in state.base}
    state.base |= new
    state.owners |= {name: owners[name] for name in new}
    mixin = choosing(tuple(state.base), isinstance(owner, nn.RNNBase), _forward_of(owner))
    if mixin not in type(owner).__mro__:
        take_off(owner, ChoosesValues)
        swap(owner, mixin)


def _forward_of(owner: nn.Module) -> str:
    """Return the class whose forward a module with rows of its weight has, if it is one that can do with the rows."""
    if not holds_rows(owner):
        return ""
    forward = original_class(owner).forward
    return next((kind.__name__ for kind in (nn.Embedding, nn.Linear) if forward is kind.forward), "")


def holds_rows(owner: nn.Module) -> bool:
    """Whether some adapter trains rows of a module's weight alone."""
    holder = owner._modules.get(VALUES)
    return holder is not None and any("weight" in values._modules for values in holder._modules.values() if values)


def chosen_names(owner: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters and buffers of which a module shows the value that is chosen."""
    names: tuple[str, ...] = getattr(type(owner), _NAMES, ())
    return names


def trained_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, TrainedState]]:
    """Yield (path, module, state) for every module that has several values of something."""
    for path, module in modules_beside(model):
        state = module.__dict__.get(TRAINED)
        if state is not None:
            yield path, module, state


def settle(model: nn.Module) -> None:
    """Let a model's own values be those that are used, in place, for good: new tensors; other values are forgotten."""
    made: dict[tuple[object, ...], Tensor] = {}
    for _, owner, state in list(trained_owners(model)):
        for name, owners in state.owners.items():
            table: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
            own = table[name]
            if own is None:
                continue
            with torch.no_grad():
                value = value_of(owner, state, name, own, state.switch.now())
            if value is not own:
                is_parameter = isinstance(own, nn.Parameter)
                value = value.detach().clone()
                value = nn.Parameter(value, requires_grad=False) if is_parameter else value
                values = tuple(_identities(owner, state.switch.now(), name))
                table[name] = made.setdefault((id(own), owners, *values), value)  # what is tied stays so
        forget(owner)


def _identities(owner: nn.Module, selection: Selection, name: str) -> Iterator[int]:
    """Yield what is equal for tied parameters that compute with the same values of adapters."""
    for adapter, _ in selection.weights:
        yield from (
            id(one) for one in (added_value(owner, adapter, name), rows_at(owner, adapter, name)) if one is not None
        )


def keep_alone(model: nn.Module, adapter: str) -> None:
    """Let a model's own values be those of one adapter, or, of what it does not train, the base's; in place."""
    alone = Selection.of([adapter])
    made: dict[int, Tensor] = {}
    for _, owner, state in trained_owners(model):
        for name, owners in state.owners.items():
            table: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
            own = table[name]
            if own is None or owners is None:
                continue
            value = _whole_value(owner, state, name, own, alone)
            if isinstance(own, nn.Parameter) and not isinstance(value, nn.Parameter):
                value = made.setdefault(id(value), nn.Parameter(value, requires_grad=False))
            is_its = adapter in owners or added_value(owner, adapter, name) is not None
            table[name], state.owners[name] = value, (adapter,) if is_its else ()
        rows = {name: one for name in state.owners if (one := rows_at(owner, adapter, name)) is not None}
        owner._modules.pop(VALUES, None)
        for name, one in rows.items():
            add_rows(owner, adapter, name, one)


def forget(owner: nn.Module) -> None:
    """Let a module have its own values alone, in place."""
    take_off(owner, ChoosesValues)
    owner.__dict__.pop(TRAINED, None)
    owner._modules.pop(VALUES, None)
    if isinstance(owner, nn.RNNBase):
        owner._flat_weights = [getattr(owner, name, None) for name in owner._flat_weights_names]


def choose_moved_buffers(model: nn.Module, switch: Switch, base: Mapping[str, Tensor]) -> list[nn.Module]:
    """Let modules show the base's buffers where no adapter is used, in place; return the modules that are changed.

    Of each buffer that is, or may come to be, other than the base's: a persistent one of floating-point numbers (a
    running mean) may move with every call in train mode, and a count with it.
    """
    found: dict[nn.Module, dict[str, Tensor]] = {}
    for name, value in base.items():
        path, _, last = name.rpartition(".")
        owner = inside(module_at(model, path))
        own = owner._buffers.get(last)
        if own is None or isinstance(owner, fx.GraphModule) or last in chosen_names(owner):
            continue
        if value.is_meta and not own.is_meta:
            continue  # adapted without values: what it was given since is all there is
        lasting = last not in owner._non_persistent_buffers_set and (own.is_floating_point() or own.dim() == 0)
        if lasting or not are_equal(own, value):
            found.setdefault(owner, {})[last] = value
    for owner, values in found.items():
        choose_values(owner, switch, values, dict.fromkeys(values))
    return list(found)


def are_equal(one: Tensor | None, other: Tensor) -> bool:
    """Whether two tensors have the same values, or, without values, the same shape."""
    if one is None:
        return False
    if one.is_meta or other.is_meta or one.shape != other.shape:
        return one.shape == other.shape
    return torch.equal(one, other.to(one.device, one.dtype))
