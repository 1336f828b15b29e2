"""Count which parameters of a model multiply activations, by means of its own: nothing here is taken from lora_fx.

Every kernel that a call runs is seen, with the memory of its operands.  What is computed from parameters, buffers and
indices alone (views, casts, copies, picked members, reparametrizations) is still a weight.  A kernel counts unless it
is known not to multiply (`NO_PRODUCT`), so one that nobody has thought of counts too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Names = frozenset[str]

ELEMENTWISE = frozenset(
    {"add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "neg", "exp", "log", "sigmoid", "tanh",
     "softplus", "pow", "rsqrt", "sqrt", "sum", "mean", "norm", "linalg_vector_norm", "maximum", "minimum",
     "clamp", "clamp_min", "where", "eq", "ne", "gt", "lt", "isnan", "isfinite", "is_nonzero",
     "_local_scalar_dense", "_weight_norm_interface", "upsample_bicubic2d", "upsample_bilinear2d", "equal",
     "max", "min", "abs"}
)  # fmt: skip
NORMS = frozenset(
    {"native_layer_norm", "native_batch_norm", "_native_batch_norm_legit", "native_group_norm",
     "_fused_rms_norm", "rms_norm", "cudnn_batch_norm"}
)  # fmt: skip
MOVES = frozenset(
    {"t", "view", "_unsafe_view", "_reshape_alias", "transpose", "permute", "expand", "unsqueeze", "squeeze",
     "select", "slice", "split", "split_with_sizes", "unbind", "as_strided", "detach", "alias", "lift_fresh",
     "clone", "_to_copy", "copy_", "contiguous", "index", "index_select", "cat", "stack", "chunk", "narrow",
     "repeat", "constant_pad_nd", "pad", "empty_like", "zeros_like", "ones_like", "new_zeros", "new_empty",
     "fill_", "bernoulli", "bernoulli_", "native_dropout"}
)  # fmt: skip
NO_PRODUCT = ELEMENTWISE | NORMS | MOVES
FACTORS = {
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "addbmm", "_addmm_activation"), slice(1, 3)),
    "convolution": slice(0, 2),
    **dict.fromkeys(("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"), slice(0, 3)),
}
"""The operands that a kernel multiplies, where it adds others (a bias, a mask)."""
FUSED = frozenset(
    ["_transformer_encoder_layer_fwd", "_native_multi_head_attention", "mkldnn_rnn_layer", "lstm", "gru", "rnn_tanh"]
)
"""Kernels for a whole layer: they multiply by the matrices that they get, and add the vectors."""


class Counter(TorchDispatchMode):
    """Sees kernels, and notes which parameters they multiply by: for each its names, and the kernels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.multiplying: dict[Names, set[str]] = {}
        self.called: list[nn.Module] = []
        self.owners: dict[str, nn.Module] = {}
        self.neutral = {_memory(buffer) for buffer in model.buffers()}
        self.weights: dict[int, Names] = {}
        self.kept: list[Tensor] = []
        for path, module in model.named_modules(remove_duplicate=False):
            for name, parameter in module.named_parameters(recurse=False):
                full = f"{path}.{name}".lstrip(".")
                self.owners[full] = module
                self.weights[_memory(parameter)] = self.weights.get(_memory(parameter), frozenset()) | {full}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        operands = _tensors((args, kwargs))
        if name in NO_PRODUCT:
            self._derive(operands, result)
        else:
            factors = _tensors(args[FACTORS[name]]) if name in FACTORS else operands
            self._count(name, factors)
        return result

    def _derive(self, operands: list[Tensor], result: Any) -> None:
        """What comes from weights, and from indices, buffers and numbers, is a weight."""
        telling = [
            argument
            for argument in operands
            if argument.is_floating_point() and argument.dim() and not self._neutral(argument)
        ]
        sources = [self.weights.get(_memory(operand)) for operand in telling]
        if sources and all(sources):
            for made in _tensors(result):
                if _memory(made) not in self.weights and made.is_floating_point():
                    self.weights[_memory(made)] = frozenset.union(*(source for source in sources if source))
                    self.kept.append(made)  # or another tensor gets its memory

    def _neutral(self, tensor: Tensor) -> bool:
        return _memory(tensor) in self.neutral

    def _count(self, name: str, factors: list[Tensor]) -> None:
        for factor in factors:
            names = self.weights.get(_memory(factor))
            if names is not None and not (name in FUSED and factor.dim() < 2):
                self.multiplying.setdefault(self._narrowed(names), set()).add(name)

    def _narrowed(self, names: Names) -> Names:
        """Of a tied weight, the names in the module that is being called, if it is there."""
        inside = frozenset(name for name in names if self.called and self.owners[name] is self.called[-1])
        return inside or names


@contextlib.contextmanager
def _calls(called: list[nn.Module]) -> Iterator[None]:
    hooks = (
        register_module_forward_pre_hook(lambda module, _: called.append(module)),
        register_module_forward_hook(lambda *_: (called.pop(), None)[1], always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def multiplying_weights(model: nn.Module, call: Callable[[], object]) -> dict[Names, set[str]]:
    """Return what multiplies in a call of the model: the names of each parameter, with the kernels that got it."""
    counter = Counter(model)
    with _calls(counter.called), counter:
        call()
    return counter.multiplying


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
