"""afresh: what writes into a tensor that the graph has just made makes another one instead, as other passes need it.

`sums /= total` of a router, or `buckets += offset` of positions: nobody else has the tensor, so it is the same as
`sums = sums / total`.  For copies of a region graph: the code that is proven bit by bit writes as the forward does.
"""

import functools
from dataclasses import dataclass

from torch import fx

from lora_fx.capture.tracing.writer import writes
from lora_fx.models.torch_internals import set_grad_enabled
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.flatten import adapted_output
from lora_fx.passes.pointwise import is_alias, operation
from lora_fx.passes.rowwise import ALONG_A_DIMENSION, ENTRY_BY_ENTRY, QUESTIONS

_WRITTEN = frozenset({"add", "sub", "mul", "div", "true_divide", "clamp", "masked_fill", "neg", "abs"})
"""Operations whose forms with and without an underscore compute the same numbers, under autocast too (pow does not)."""
_MAKES = (ENTRY_BY_ENTRY | ALONG_A_DIMENSION | {"linear", "matmul", "bmm"}) - {"contiguous", "dropout"}
"""Operations whose result has memory of its own, unless it is an alias."""
_CASTS = frozenset({"to", "type_as", "float", "half", "bfloat16", "double"})
_MAKE_TWO = frozenset({"topk", "sort"})
"""Operations that make two tensors."""


@dataclass(frozen=True, slots=True)
class Afresh(Pass):
    """Write into no tensor that the graph has made for itself.  Ensures: the same results and gradients."""

    name: str = "afresh"

    def run(self, editor: Editor) -> None:
        if any(node.target is set_grad_enabled for node in editor.graph.nodes):
            return  # what is written without gradients keeps those that it has; what is made has none
        for node in list(editor.graph.nodes):
            if node.op == "call_method" and writes(node) and _may_be_made(node):
                with editor.writing_after(node, "") as write:
                    made = write.graph.call_method(str(node.target)[:-1], node.args, node.kwargs)
                written = node.args[0]
                assert isinstance(written, fx.Node)
                made.meta.update(written.meta)
                editor.replace_uses(written, made, "", but=functools.partial(_is_no_later, made))
                editor.replace(node, made, "")


def _is_no_later(made: fx.Node, user: fx.Node) -> bool:
    return user <= made


def _may_be_made(node: fx.Node) -> bool:
    """Whether the tensor that a node writes to is the graph's own, shown by no other, and keeps dtype and size."""
    x, *others = node.all_input_nodes
    if str(node.target)[:-1] not in _WRITTEN or node.args[0] is not x or x in others or "tensor" not in x.meta:
        return False
    if not _is_made(x) or not all(_shows_nothing(user) for user in x.users if user < node):
        return False
    dtypes = [other.meta["tensor"][1] if "tensor" in other.meta else None for other in others]
    return all(dtype is x.meta["tensor"][1] for dtype in dtypes)  # a weight may have any: none is noted


def _shows_nothing(user: fx.Node) -> bool:
    """Whether what an earlier user of a tensor gives is known to be no view of it: anything else may be one."""
    if user.target is adapted_output:
        return True
    asks = operation(user) in QUESTIONS and "tensor" not in user.meta
    return asks or operation(user) in _MAKE_TWO or _has_own_memory(user)


def _is_made(x: fx.Node) -> bool:
    """Whether a tensor has memory of its own, in which no other tensor lies."""
    source = x.all_input_nodes[0] if x.all_input_nodes else None
    if source is not None and operation(x) == "getitem":
        return operation(source) in _MAKE_TWO
    return _has_own_memory(x)


def _has_own_memory(node: fx.Node) -> bool:
    """Whether an operation puts its result into new memory."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if source is None or node.kwargs.get("inplace") or "out" in node.kwargs or any(v is True for v in node.args):
        return False
    if operation(node) in _CASTS and "tensor" not in source.meta:
        return False  # perhaps it had the dtype already
    return operation(node) in _MAKES and not is_alias(node)
