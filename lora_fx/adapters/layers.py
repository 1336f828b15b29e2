"""The module backend: adapted modules compute base + scaling · B A dropout(x) in their own forward.

It is the meaning that the graph backend must equal, and what runs wherever a graph does not.  A layer that is called
adds the low-rank product to its output; a weight that is read shows itself as a LoRAWeight, and whatever is computed
with it is right.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import (
    READS,
    STATE,
    AdapterState,
    Attached,
    attached_to,
    in_use,
    low_rank_of,
    shown_parameters,
)
from lora_fx.adapters.factors.kinds import CallFactors
from lora_fx.adapters.factors.lora import add_low_rank, as_rows
from lora_fx.adapters.fused.convolution import Settings, convolved, settings_without_input
from lora_fx.adapters.fused.eligible import row_factors, term_of
from lora_fx.adapters.fused.forward import adapted
from lora_fx.adapters.fused.terms import Term
from lora_fx.adapters.parallel import on_parts, refuse_rows
from lora_fx.adapters.rawweight.factored import Factored
from lora_fx.adapters.rawweight.known_experts import experts_output
from lora_fx.adapters.rawweight.ofrows import WeightOfRows
from lora_fx.adapters.rawweight.weight import LoRAWeight, Part
from lora_fx.adapters.reads import take_over, wants_parameter
from lora_fx.adapters.rows import AdapterRows, with_plain_rows, with_rows
from lora_fx.adapters.selection import Chosen, Switch
from lora_fx.adapters.shown import ShowsAdapters
from lora_fx.adapters.tokens import Tokens, refuse_reading, unknown_tokens
from lora_fx.errors import RefusedError
from lora_fx.models.layers import base_output, bias_of
from lora_fx.models.packed import held_weight, own_forward
from lora_fx.models.shards import added_up, is_sharded
from lora_fx.models.swap import MADE_BY, original_class
from lora_fx.models.torch_internals import in_backward, transformation


class AdaptedExperts(ShowsAdapters):
    """Mixin for routed experts whose forward is a known one: both banks and their adapters are one operation."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = None if torch.compiler.is_compiling() else experts_output(self, args, kwargs)
        return super().forward(*args, **kwargs) if result is None else result


@functools.cache
def reading(names: tuple[str, ...], are_experts: bool = False) -> type:
    """Return the mixin for a module that shows the parameters of these names with their adapters."""
    body: dict[str, Any] = {name: property(_reader(name), take_over(name)) for name in names}
    kind = AdaptedExperts if are_experts else ShowsAdapters
    return type("AdaptedWeights", (kind,), {**body, READS: names, MADE_BY: (reading, (names, are_experts))})


def _reader(name: str) -> Callable[[nn.Module], Tensor | None]:
    def read(owner: nn.Module) -> Tensor | None:
        base = owner._parameters[name]
        if base is None or wants_parameter():
            return base
        try:
            used = in_use(owner, name)
        except RefusedError as refusal:
            switch: Switch = owner.__dict__[STATE].switch
            if torch.compiler.is_compiling() or switch.for_call().rows is None:
                raise
            return WeightOfRows.of(base, refusal)
        return shown(used, base) if used else base

    return read


Used = Sequence[tuple[Attached, float]]
"""Adapters beside one weight that are used, each with its weight."""


def shown(used: Used, base: Tensor) -> Tensor:
    """Return the adapted weight as it is read: a LoRAWeight, or a plain tensor for those who need one.

    Raises:
        RefusedError: several adapters are used and one has dropout: of each, the input would have to be dropped apart.
    """
    refuse_reading([(one.spec.path, one.spec.adapter) for one, _ in used if one.spec.lora.invocation])
    owner = used[0][0].owner
    fused = owner.__dict__[STATE].dense and not owner.training and not torch.is_grad_enabled()
    wrapped = torch.compiler.is_compiling() or transformation() is not None
    if fused or wrapped:  # vmap, grad and the compiler put tensors of their own around
        return effective_weight(used, base)
    dropouts = [adapter.dropout for adapter, _ in used if adapter.dropout is not None and adapter.dropout.training]
    if dropouts and len(used) > 1:
        facts = [(one.spec.path, f"{one.spec.adapter}, dropout {one.spec.lora.dropout:g}") for one, _ in used]
        advice = "use one adapter, or call eval()"
        raise RefusedError("a weight that is read has one input for several adapters with dropout", facts, advice)
    low = low_rank_of(used)
    if any(adapter.magnitude is not None for adapter, _ in used):
        if not dropouts:
            return effective_weight(used, base)
        base, low = _lengthened(*used[0], base, low)
    return LoRAWeight(Part(base, low, dropouts[0] if dropouts else None, is_called=not shown_parameters(owner)))


def _lengthened(adapter: Attached, share: float, base: Tensor, low: Factored) -> tuple[Tensor, Factored]:
    """Return both parts of DoRA's weight, m/‖V‖ · W and m/‖V‖ · scaling · B A; dropout reaches the second alone."""
    assert adapter.magnitude is not None
    layout = adapter.spec.site.layout
    scale = adapter.magnitude.scale(as_rows(base, layout), adapter.lora_A.matrix, adapter.lora_B.matrix)
    more = (share * (scale - 1)).to(base.dtype)
    if layout == "in_out":
        return base + more * base, replace(low, columns=low.columns * scale)
    return base + more.view(-1, *(1 for _ in base.shape[1:])) * base, replace(low, rows=low.rows * scale.unsqueeze(1))


def effective_weight(used: Used, base: Tensor) -> Tensor:
    """Return W + Σ weight · ΔW in W's dtype, through which gradients reach the adapters (DoRA: m · V / ‖V‖)."""
    whole = base
    for adapter, share in used:
        whole = _changed(adapter, base) if share == 1 and whole is base else _added(whole, adapter, share, base)
    return whole


def _added(whole: Tensor, adapter: Attached, share: float, base: Tensor) -> Tensor:
    plain = adapter.magnitude is None
    return whole + share * (adapter.delta().to(base.dtype) if plain else _changed(adapter, base) - base)


def _changed(adapter: Attached, base: Tensor) -> Tensor:
    if adapter.magnitude is None:
        return base + adapter.delta().to(base.dtype)
    return adapter.magnitude.stored(base, adapter.lora_A.matrix, adapter.lora_B.matrix, adapter.spec.site.layout)


class AdaptedLayer(ShowsAdapters):
    """Mixin for an adapted layer that is called; its class keeps the name, the keys and the attributes it had."""

    lora_A: Any  # nn.ModuleDict of LoRAFactor; nn.Module's own annotations would call it a Tensor
    lora_B: Any
    lora_dropout: Any
    lora_magnitude_vector: Any
    weight: Any = property(_reader("weight"), take_over("weight"))
    """For code that multiplies by it itself (tied heads, chunked losses): with the adapter, as a LoRAWeight."""

    def forward(self, input: Tensor) -> Tensor:
        return self.adapted_forward(input)

    def adapted_forward(self, input: Tensor) -> Tensor:
        """Return what the module computes with the adapters that are used."""
        if torch.compiler.is_compiling() and self.invocations():
            return self._outside_of_compiled(input)  # type: ignore[no-any-return]
        switch: Switch = self.__dict__[STATE].switch
        selection = switch.for_call()
        if selection.rows is not None:
            return self._row_by_row(selection.rows, input)  # type: ignore[no-any-return]
        chosen = selection.at(self.lora_A._modules)
        if not chosen:
            return self.base_forward(input)
        tokens = self.tokens_of([name for name, _ in chosen]) if switch.invocations else None
        term = term_of(self, chosen, input) if tokens is None else None
        if term is not None:
            return adapted((term,), input)[0]
        if tokens is not None and tokens.seen is not None:
            tokens.seen.note(self, input)
            return self.base_forward(input)
        settings = settings_without_input(self, chosen, input)
        base = convolved(self.base_forward, settings, self._stored, input) if settings else self.base_forward(input)
        if "lora_magnitude_vector" in self._modules and not torch.compiler.is_compiling():
            base = added_up(base)
        number = self._number_of_call(name for name, _ in chosen)
        result = base
        for name, share in chosen:
            added = self._added(result, base, input, name, share, number, settings)
            result = added if tokens is None else self._where_it_acts(tokens, name, input, added, result)
        return result

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _outside_of_compiled(self, input: Tensor) -> Tensor:
        """Compute where no compiler follows: on which tokens an adapter acts is another matter at each call."""
        return self.adapted_forward(input)

    def _where_it_acts(self, tokens: Tokens, name: str, input: Tensor, added: Tensor, result: Tensor) -> Tensor:
        """Return a result with one more adapter in it, on the tokens on which that acts."""
        if name not in tokens.starts:
            return added
        return torch.where(tokens.mask(name, input, self._path()), added, result)

    def _path(self) -> str:
        return next(iter(attached_to(self))).spec.path

    def invocations(self) -> dict[str, tuple[int, ...]]:
        """Return the invocation of each of the model's adapters that has one."""
        switch: Switch = self.__dict__[STATE].switch
        return switch.invocations

    def tokens_of(self, names: Iterable[str]) -> Tokens | None:
        """Return on which tokens those of these adapters act that have an invocation; None where all act on each.

        Raises:
            RefusedError: nobody has said which those of the call are.
        """
        invocations = self.invocations()
        invoked = [name for name in names if name in invocations] if invocations else []
        if not invoked:
            return None
        switch: Switch = self.__dict__[STATE].switch
        tokens = switch.for_call().tokens
        if tokens is None:
            raise unknown_tokens(self._path(), {name: invocations[name] for name in invoked})
        return None if tokens.everywhere else tokens

    @property
    def _stored(self) -> Tensor:
        """The base weight itself."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def _number_of_call(self, names: Iterable[str]) -> int:
        """Return the number of the call that begins, and count it, if one of these adapters has factors for each."""
        calls = [len(self.lora_A[name]) for name in names if type(self.lora_A[name]) is CallFactors]
        return _next_call(self, min(calls)) if calls else 0

    def _added(
        self,
        result: Tensor,
        base: Tensor,
        input: Tensor,
        name: str,
        share: float,
        number: int,
        settings: Settings | None = None,
    ) -> Tensor:
        """Return a result with one more adapter in it, operation by operation.

        `settings` are those of a convolution whose input is not kept; None for all else.
        """
        A, B, dropout = self.lora_A[name], self.lora_B[name], None
        magnitude: Callable[[Tensor, Tensor], Tensor] | None = None
        if type(A) is CallFactors:
            A, B = A[number], B[number]
        lora = A.spec.lora
        if lora.dropout:
            dropout = self.lora_dropout[name]
        if lora.dora:
            whole = functools.partial(
                self.lora_magnitude_vector[name],
                weight=as_rows(self._stored, A.spec.site.layout),
                bias=bias_of(self),
                lora_A=A.matrix,
                lora_B=B.matrix,
            )
            alone = result is base and share == 1
            magnitude = whole if alone else lambda onto, delta: whole(base, delta, onto=onto, share=share)
        scaling = lora.scaling if lora.dora else lora.scaling * share
        one_hot = A.spec.site.op == "embedding"
        first, second = functools.partial(convolved, A, settings, A.filters) if settings else A, B
        if not torch.compiler.is_compiling() and is_sharded(A._parameters.get("weight")) and not is_sharded(input):
            first, second = on_parts(A, B)
        return add_low_rank(result, input, first, second, dropout, magnitude, scaling, A.spec.mixed, one_hot)

    def adapted_term(self, input: Tensor) -> Term | None:
        """Return the layer with its adapters as a term of a fused product with the input, if it can be one."""
        switch: Switch = self.__dict__[STATE].switch
        selection = switch.for_call()
        if selection.rows is not None:
            return None
        chosen = selection.at(self.lora_A._modules)
        if not chosen or (switch.invocations and self.tokens_of([name for name, _ in chosen]) is not None):
            return None
        return term_of(self, chosen, input)

    def chosen_rows(self) -> AdapterRows | None:
        """Return the adapters of the rows of the batch, if each has its own."""
        switch: Switch = self.__dict__[STATE].switch
        return switch.for_call().rows

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _row_by_row(self, rows: AdapterRows, input: Tensor) -> Tensor:
        base = self.base_forward(input)
        if not self.lora_A._modules:  # all of its adapters were dropped
            return base
        refuse_rows(self, self._path())
        if rows.seen is not None:
            rows.seen.note(self, input)
            return base
        held = frozenset(self.lora_A._modules)
        tokens = self.tokens_of([name for name in rows.names if name is not None and name in held])
        if tokens is not None:
            base = self._invoked_rows(base, rows, tokens, input)
            held = held.difference(tokens.starts)
        owners = rows.among(held)
        if owners.names == (None,):
            return base
        layout = rows.layout_of(self, next(iter(attached_to(self))).spec.path, input)
        factors = row_factors(self, owners.names, input)
        if factors is not None:
            return with_plain_rows(base, input, layout, owners, rows.stacked(self, owners, factors))
        number = self._number_of_call(filter(None, owners.names))
        return with_rows(
            base, input, layout, owners, lambda onto, x, name: self._added(onto, onto, x, name, 1.0, number)
        )

    def _invoked_rows(self, base: Tensor, rows: AdapterRows, tokens: Tokens, input: Tensor) -> Tensor:
        """Return a base output with the adapters that have an invocation in their rows, on the tokens from it on."""
        held = self.lora_A._modules.keys() & tokens.starts.keys()
        for name in (name for name in dict.fromkeys(rows.names) if name is not None and name in held):
            mask = tokens.mask(name, input, self._path(), rows.names)
            base = torch.where(mask, self._added(base, base, input, name, 1.0, 0), base)
        return base

    def chosen_adapters(self) -> Chosen:
        """Return which of its adapters the call that begins uses."""
        switch: Switch = self.__dict__[STATE].switch
        return switch.for_call().at(self.lora_A._modules)

    @property
    def lora_fx_layer(self) -> nn.Module:
        """The layer, by a name that a graph of its own forward can use."""
        return self

    def base_forward(self, input: Tensor) -> Tensor:
        """Return what the module computes without its adapter."""
        return base_output(self, input)


def _codes(layer: nn.Module) -> Any:
    if "weight" not in layer._parameters:  # what it holds has another name
        raise AttributeError(f"a {type(layer).__name__} with codes has no weight")
    return layer._parameters["weight"]


class AdaptedPacked(AdaptedLayer):
    """Mixin for a layer that holds codes: it computes by its own forward, and its `weight` is what it is without us."""

    weight: Any = property(_codes, take_over("weight"))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer's class gives, with the adapters: hqq's gives what it holds itself, no child."""
        state: Any = super().state_dict(*args, **kwargs)
        kind: Any = original_class(self)
        if kind.state_dict is not nn.Module.state_dict:
            given, prefix = kwargs.get("destination"), kwargs.get("prefix", "")
            for name, child in self._modules.items():
                if child is not None:
                    child.state_dict(destination=state if given is None else given, prefix=f"{prefix}{name}.")
        return state

    @property
    def _stored(self) -> Tensor:
        return held_weight(self, "weight")

    def base_forward(self, input: Tensor) -> Tensor:
        return own_forward(self, input)


def _next_call(owner: nn.Module, calls: int) -> int:
    """Return the number of the call that begins, and count it."""
    if in_backward():
        raise RefusedError(
            "an adapter for each call cannot be used with activation checkpointing: a call that is made again in the "
            "backward pass does not say which one it is",
            advice="leave out `per_call: true`, or checkpoint other modules",
        )
    state: AdapterState = owner.__dict__[STATE]
    number = state.called or 0
    if number >= calls:
        if state.within:
            raise RefusedError(
                f"a forward calls a module more often than the {calls} times for which it has an adapter each",
                advice="apply with example_inputs that call it as often, or leave out `per_call: true`",
            )
        number = 0  # a part of the model is run alone: its calls begin again
    owner.__dict__[STATE] = replace(state, called=number + 1)
    return number


def count_calls_anew(root: nn.Module, _args: Any = None) -> None:
    """Begin to count the calls of every module with an adapter for each: a forward of the whole model begins."""
    _set_calls(root, True)


def stop_counting(root: nn.Module, _args: Any, _result: Any) -> None:
    """Note that the forward of the whole model has ended."""
    _set_calls(root, False)


def _set_calls(root: nn.Module, within: bool) -> None:
    for module in root.modules():
        state = module.__dict__.get(STATE)
        if state is not None and state.called is not None:
            module.__dict__[STATE] = replace(state, called=0, within=within)
