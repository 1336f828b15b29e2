"""What a step makes on one device of a mesh, seen as the whole model runs on the meta device.

Of a weight that is split over `tp` devices each has 1 / tp.  What is computed of such a part is a part too, and what is
made of both a part of the activations and of the weights that they meet is a sum over the parts, and whole:

    columns   x whole, W split along its outputs: x Wᵀ split; in the backward pass dY split, W split: dX whole
    rows      x split, W split along its inputs: x Wᵀ whole; in the backward pass dY whole, W split: dX split

The same holds for A and B, so that nothing has to know what a layer is.  Attention over heads that are split is split.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_fx.bench.counters import Tally, flops_of
from lora_fx.meshes.numbers import KnownNumbers
from lora_fx.meshes.remembered import RememberedKernels
from lora_fx.models.torch_internals import pytree

_ATEN = torch.ops.aten
_SUMS = frozenset(
    (
        _ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.addmm_, _ATEN.baddbmm_, _ATEN._grouped_mm, _ATEN.mv,
        _ATEN.addmv,
    )
)  # fmt: skip
"""Operators that multiply what they are given last, and sum."""


class OneDevice(Tally):  # type: ignore[no-untyped-call]
    """Counts what one of `tp` devices makes, computes and holds of a step on the meta device."""

    def __init__(self, tp: int, model: nn.Module, split: Iterable[Tensor]) -> None:
        super().__init__()
        self._tp = tp
        self.numbers = KnownNumbers()
        self._kernels, self._flops = RememberedKernels(_run, flops_of), 0
        self.gathered = self.most = 0
        """Bytes that are gathered now, and the most that were live at once with what was gathered then."""
        self.seen: Callable[[OneDevice, list[Tensor], list[Tensor]], None] | None = None
        """Is told after each operator, with what that was given and has made."""
        self._weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self._split = {tensor.untyped_storage()._cdata for tensor in split}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = self.numbers.answer(func, args)
        if answer is not None:
            return answer
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.numbers.follow(func, args, kwargs or {}, result)
        return result

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operator does."""
        result, self._flops = self._kernels.call(func, args, kwargs)
        return result

    def computes(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        """Return the FLOPs of the operator that was just called."""
        return self._flops

    def share(self, func: Any, given: list[Tensor], flops: int) -> int:
        """Of an operator on parts each device computes its part."""
        return flops // self._tp if self._parts(given) else flops

    def size_of(self, tensor: Tensor) -> int:
        """Return the bytes of the whole; `after` knows whether it is a part."""
        return tensor.untyped_storage().nbytes()

    def after(self, func: Any, given: list[Tensor], made: list[Tensor]) -> None:
        """Note what is made of parts, and what is made of weights alone, such as a cast."""
        is_part = self._makes_part(func._overloadpacket, given)
        of_weights = bool(given) and all(self._is_weight(tensor) for tensor in given)
        for tensor in made:
            key = tensor.untyped_storage()._cdata
            if of_weights:
                self._weights.add(key)
            if is_part:
                self.mark(tensor, is_part=True)
        self.most = max(self.most, self.live + self.gathered)
        if self.seen is not None:
            self.seen(self, given, made)

    def bytes_of(self, tensor: Tensor) -> int:
        """Return the bytes of a tensor that this device has made; 0 for what was there before."""
        return self._known.get(tensor.untyped_storage()._cdata, 0)

    def sizes(self) -> list[tuple[int, int]]:
        """Return the number and the bytes of each storage that this device has made and that is live."""
        return list(self._known.items())

    def mark(self, tensor: Tensor, is_part: bool) -> None:
        """Let a tensor count as a part of what all devices have, or as whole."""
        key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        (self._split.add if is_part else self._split.discard)(key)
        if key in self._known:
            self.resize(key, -(-size // self._tp) if is_part else size)

    def gone(self, key: int) -> None:
        """Forget a storage; the next one may have its number."""
        super().gone(key)
        self._split.discard(key)
        self._weights.discard(key)

    def _parts(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return [tensor for tensor in tensors if tensor.untyped_storage()._cdata in self._split]

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._weights

    def _makes_part(self, packet: Any, given: list[Tensor]) -> bool:
        parts = self._parts(given)
        if packet in _SUMS:
            factors = self._parts(given[-3:-1] if packet is _ATEN._grouped_mm else given[-2:])
            return len(parts) > 0 and not (len(factors) == 2 and any(map(self._is_weight, factors)))
        # rows of a split table are looked up where they are, and summed
        return len(parts) > 0 and packet is not _ATEN.embedding

    def gathering(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Return a layer's output whole: a hook for layers whose outputs are gathered."""
        return pytree.tree_map_only(Tensor, lambda tensor: _gathered(tensor, self), output)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Return what an operator does; torch's groups of products are for bfloat16 alone on the meta device."""
    if func is _ATEN._grouped_mm.default and args[0].dtype != torch.bfloat16:
        a, b = args[:2]
        groups = [len(args[2])] if a.dim() == b.dim() == 2 else [len(a)] if a.dim() == b.dim() else []
        return a.new_empty(*groups, a.shape[-2], b.shape[-1])
    return func(*args, **kwargs)


class _Gathered(torch.autograd.Function):
    """All parts of a tensor; in the backward pass each device takes its part of the gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, device: OneDevice) -> Tensor:
        ctx.device = device
        whole = part.clone()
        device.mark(whole, is_part=False)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        part = gradients[0].clone()
        ctx.device.mark(part, is_part=True)
        return part, None


_gathered: Any = _Gathered.apply


class KernelAttention(TorchFunctionMode):
    """Attention as kernels compute it: without a matrix of scores, which the meta device would make."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function: Callable[..., Any] = func
        if func is torch.nn.functional.scaled_dot_product_attention:
            function = _attention
        return function(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Return what `scaled_dot_product_attention` does on the meta device; arguments are its."""
    is_trained = (
        attn_mask is not None and attn_mask.requires_grad
    )  # as T5's biases are, which no kernel gives a gradient
    if is_trained or (query.dim() != 4 and (enable_gqa or attn_mask is not None)):  # as it is, with its scores
        whole = torch.nn.functional.scaled_dot_product_attention
        return whole(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if query.shape[-1] == value.shape[-1] and query.dim() == 4:
        flash: Any = _ATEN._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    if query.dim() != 4:
        q, k, v = (tensor.reshape(-1, 1, *tensor.shape[-2:]) for tensor in (query, key, value))
        result = _attention(q, k, v, None, dropout_p, is_causal, scale)
        return result.reshape(*query.shape[:-1], value.shape[-1])
    if enable_gqa and key.shape[-3] != query.shape[-3]:  # the kernel before takes fewer heads of keys as they are
        times = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(times, -3) for tensor in (key, value))
    efficient: Any = _ATEN._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
