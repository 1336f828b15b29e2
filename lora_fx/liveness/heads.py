"""A linear whose output nobody reads row by row but a loss: it gives a lazy tensor, where a call allows it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.adapters.attach import READS, STATE
from lora_fx.adapters.fused.eligible import dropout_of, is_watched, term_of
from lora_fx.adapters.fused.forward import adapted
from lora_fx.adapters.fused.terms import autocast_dtype, product_dtype
from lora_fx.adapters.layers import AdaptedLayer
from lora_fx.adapters.selection import is_off
from lora_fx.adapters.trained import chosen_names
from lora_fx.liveness.head import HeadSource
from lora_fx.liveness.rows import LazyRows, lazy
from lora_fx.liveness.sources import LazyValue
from lora_fx.models.layers import bias_of, has_hooks, linear_layout
from lora_fx.models.overrides import replaced_forward
from lora_fx.models.quantised import is_quantised
from lora_fx.models.swap import Swapped, swap, take_off
from lora_fx.models.torch_internals import checkpointing, in_backward
from lora_fx.models.walking import modules_of

LATE = "lora_fx_late"
"""Attribute of a module whose output is computed late."""
_TRAINED = ("bias", "A", "B", "scale")
"""What of a term may get a gradient."""


@dataclass(slots=True, eq=False)
class LateState:
    """What is known of one such module."""

    path: str
    what: str = "loss"
    """Name of the optimisation that it serves."""
    enabled: bool = True
    calls: int = 0
    """How many calls gave a lazy tensor."""
    otherwise: Counter[str] = field(default_factory=Counter)
    """Why others did not."""
    made: list[LazyValue] | None = None
    """What has been given, while it is watched; else None."""
    given: Tensor | None = None
    """An input that it was given, while it is watched."""
    weight: Tensor | None = None
    """The module's own, as it was found; None in a copy."""

    def __getstate__(self) -> tuple[Any, ...]:
        return self.path, self.what, self.enabled, self.calls, self.otherwise

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.path, self.what, self.enabled, self.calls, self.otherwise = state
        self.made = self.given = self.weight = None


class ComputesLate(Swapped, nn.Module):
    """Base of the mixins for modules whose output is computed when it is asked for."""


class LateHead(ComputesLate):
    """Mixin for the linear that makes logits."""

    def forward(self, input: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(input)
        state: LateState = self.__dict__[LATE]
        source = late_source(self, input) if state.enabled and not is_off(state) else "it is switched off"
        if isinstance(source, str):
            state.otherwise[source] += 1
            return super().forward(input)
        return given_late(state, source, input)


def given_late(state: LateState, source: Any, input: Tensor) -> LazyRows:
    """Return the lazy tensor of a source, and note it."""
    state.calls += 1
    logits = lazy(source)
    if state.made is not None:
        state.made.append(logits.lazy_value)
        state.given = input
    return logits


def install(module: nn.Module, mixin: type, state: LateState) -> None:
    """Let a module compute its output late, in place."""
    swap(module, mixin)
    module.__dict__[LATE] = state
    state.weight = module._parameters.get("weight")


def put_outermost(model: nn.Module) -> None:
    """Let what computes late be asked before any other mixin of the same module, in place."""
    for module, state in late_modules(model):
        uninstall(module)
        install(module, LateHead, state)


def uninstall(module: nn.Module) -> None:
    """Let a module compute its output when it is called, in place, if it does not."""
    if module.__dict__.pop(LATE, None) is not None:
        take_off(module, ComputesLate)


def late_modules(model: nn.Module) -> list[tuple[nn.Module, LateState]]:
    """Return every module of a model that computes its output late, in model order."""
    return [(module, module.__dict__[LATE]) for module in modules_of(model) if LATE in module.__dict__]


def wide_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linears with more outputs than inputs, by path, as a head that makes logits is."""
    linears = {p: m for p, m in model.named_modules() if linear_layout(type(m)) == "out_in"}
    return {p: m for p, m in linears.items() if int(m.out_features) > int(m.in_features)}


def named_head(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear that a model of transformers says makes its logits, by path; no more than one."""
    asked = getattr(model, "get_output_embeddings", None)
    head = asked() if callable(asked) else None
    return {path: module for path, module in wide_linears(model).items() if module is head}


def around_the_call(module: nn.Module, input: Any) -> str:
    """Return why nothing can be late in a call like this one, whatever the module is; empty if it can."""
    if not torch.is_grad_enabled():
        return "no gradients are computed"
    if is_watched():
        return "something follows operations one by one"
    if in_backward() or checkpointing() is not None:
        return "it is run again in the backward pass"
    if has_hooks(module) or replaced_forward(module) is not None:
        return "the module has hooks or another forward"
    if type(input) not in (Tensor, nn.Parameter, LazyRows) or not input.is_floating_point() or input.is_inference():
        return f"its input is a {type(input).__name__} that is not plain"
    return ""


def late_source(head: Any, x: Tensor) -> HeadSource | str:
    """Return what makes the logits of a call, or why they cannot be late."""
    reason = around_the_call(head, x) or _obstacle(head)
    if reason:
        return reason
    weight, bias = head._parameters["weight"], bias_of(head)
    # what is asked now holds for all rows, however few are computed at once
    like = torch.empty((1, x.shape[-1]), dtype=x.dtype, device=x.device)
    dtype = product_dtype(like)
    chosen = head.chosen_adapters() if isinstance(head, AdaptedLayer) else ()
    if not chosen:
        source = _of_frozen(x, weight, bias, dtype)
    else:
        term = term_of(head, chosen, like)
        if term is None:
            return "its adapter is computed operation by operation"
        source = _of_adapted(x, term, dtype)
    if not any(tensor.requires_grad for tensor in source.inputs):
        return "no gradient passes through it"
    return source


def _obstacle(head: Any) -> str:
    """Return why a linear as it is now cannot be late."""
    if linear_layout(type(head)) != "out_in":
        return "it is no nn.Linear"
    if "weight" in chosen_names(head):
        return "its own weight is trained"
    if getattr(type(head), READS, ()):
        return "its weight is read with an adapter"
    parameters = head._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if is_quantised(weight):
        return "its weight is quantised"
    if type(weight) is not nn.Parameter or not (bias is None or type(bias) is nn.Parameter):
        return f"its weight is a {type(weight).__name__}"  # of FSDP, which takes it away after the call
    if head.__dict__[LATE].weight is not weight and dist.is_available() and dist.is_initialized():
        return "its weight was replaced, perhaps by one that is sharded after the call"  # by FSDP2
    if weight.requires_grad or (bias is not None and bias.requires_grad and STATE not in head.__dict__):
        return "its own weight is trained"
    if not weight.is_floating_point():
        return "its weight has no floating-point numbers"
    if isinstance(head, AdaptedLayer) and head.chosen_rows() is not None:
        return "each row has an adapter of its own"
    chosen = head.chosen_adapters() if isinstance(head, AdaptedLayer) else ()
    if any(name in head.invocations() for name, _ in chosen):
        return "its adapter acts from an invocation on"
    dropped = any(dropout_of(head._modules.get("lora_dropout"), name) != 0 for name, _ in chosen)
    return "its adapter has dropout" if dropped else ""


def _of_frozen(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> HeadSource:
    if autocast_dtype(x.device.type) is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    weight, bias = weight.detach(), None if bias is None else bias.detach()  # a new `data` is not seen
    frozen = [weight] if bias is None else [weight, bias]

    def function(rows: Tensor) -> Tensor:
        return F.linear(rows.to(dtype), weight, bias)

    return HeadSource(x, function, (), weight.shape[0], dtype, frozen)


def _of_adapted(x: Tensor, term: Any, dtype: torch.dtype) -> HeadSource:
    term = term._replace(facts=term.facts._replace(merged=False))
    names = [name for name in _TRAINED if getattr(term, name) is not None and getattr(term, name).requires_grad]
    others = {"weight": term.weight} | {name: getattr(term, name) for name in _TRAINED if name not in names}
    frozen = {
        name: tensor.detach() for name, tensor in others.items() if tensor is not None
    }  # a new `data` is not seen
    term = term._replace(**frozen)

    def function(rows: Tensor, *trained: Tensor) -> Tensor:
        there = term._replace(**dict(zip(names, trained, strict=True)))
        return adapted((there,), rows.to(dtype))[0]

    trained = [getattr(term, name) for name in names]
    return HeadSource(x, function, trained, term.weight.shape[0], dtype, list(frozen.values()))
