"""What a node of torch.fx says of itself: where it belongs, what it is called, what it returns."""

import re
from typing import Any

from torch import Tensor, fx

_MODULE_PATH = re.compile(r"[\w.]*")
_FACTOR = re.compile(r"\.(lora_A|lora_B|lora_dropout|lora_magnitude_vector)\.[^.]+(\.\d+)?$")


def place_of(node: fx.Node) -> str:
    """Return the path of the submodule that ran the node: as our tracer notes it, or as torch's do."""
    if "place" in node.meta:
        return str(node.meta["place"])
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack and isinstance(stack[-1], tuple) else ""
    return path if _MODULE_PATH.fullmatch(path) else ""


def value_text(node: fx.Node) -> str:
    """Return dtype and sizes of what a node computes, where the tracer has noted them."""
    if "tensor" in node.meta:
        sizes, dtype = node.meta["tensor"]
    elif isinstance(node.meta.get("val"), Tensor):
        sizes, dtype = node.meta["val"].shape, node.meta["val"].dtype
    else:
        return ""
    return f"{str(dtype).removeprefix('torch.')} [{', '.join(map(str, sizes))}]"


def factor_of(node: fx.Node) -> str:
    """Return lora_A, lora_B or lora_dropout for a call of an adapter's module, else ""."""
    match = _FACTOR.search(str(node.target)) if node.op == "call_module" else None
    return match[1] if match else ""


def stem_of(node: fx.Node) -> str:
    """Return a name for what a node computes: the last parts of a module's path, or the function's name."""
    if node.op in ("call_module", "get_attr"):
        path = str(node.target) if node.op == "call_module" else str(node.target).rpartition(".")[0]
        parts = [part for part in path.split(".") if not part.isdigit()]
        return "_".join(parts[-2:]) or "module"
    name = function_name(node.target).removeprefix("torch.").removeprefix("F.")
    return re.sub(r"\W", "", name.partition(".")[0]) or "value"  # aten's `linear.default` is called linear


def function_name(target: Any) -> str:
    """Return how a function is written: `torch.cat`, `F.gelu`, `linear.default`."""
    if isinstance(target, str):
        return target
    name = str(target.__name__)
    home = str(target.__module__ or "")
    if home in ("torch._C._nn", "torch.nn.functional"):
        return f"F.{name}"
    return f"torch.{name}" if home.startswith("torch") and "." not in name else name
