"""A checkpoint as a model without forward: names and shapes of its tensors, on the meta device."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.errors import MergeError
from lora_fx.files.checkpoint.basefiles import weight_map
from lora_fx.files.safetensors import RawTensor, read_raw
from lora_fx.files.values import DTYPES

INDEX_SUFFIX = ".safetensors.index.json"
_MOST_MODULES = 3
"""For each tensor; a model's modules have one or two."""
_EMBEDDING = re.compile(r"embed|^wte$|^wpe$|^shared$")


class Checkpoint(nn.Module):
    """What a checkpoint holds.  It has no forward: how a weight is used is read from its shape and its name."""


def checkpoint_model(path: str) -> Checkpoint:
    """Return the tensors of a safetensors file, or of the shards of an index, as modules on the meta device.

    A matrix called `weight` is taken for a linear (for one that stores [in, out] where only the bias fits so), or for
    an embedding if its module is called like one; all else stays a parameter.

    Raises:
        MergeError: a file is missing or damaged, or has a name that nothing in a model can have.
    """
    tensors = dict(_tensors(Path(path)))
    _refuse_deep(path, tensors)
    model = Checkpoint()
    for name in tensors:
        owner, _, last = name.rpartition(".")
        try:
            _place(_submodule(model, owner, tensors), last, tensors[name])
        except (KeyError, AttributeError, TypeError) as error:  # such as "", "forward"
            raise MergeError(f"{path}: a name fits no module", [(name, str(error))]) from error
    return model


def _refuse_deep(path: str, tensors: Iterable[str]) -> None:
    """Each part of a name becomes a module, which takes a hundred times the memory of the part."""
    names = sorted(name.split(".")[:-1] for name in tensors)
    modules = sum(map(_new_parts, names, [[], *names]))
    if modules > _MOST_MODULES * len(names) + 1_000:
        raise MergeError(f"{path}: its names are of {modules:,} modules, for {len(names):,} tensors: of no model")


def _new_parts(name: Sequence[str], before: Sequence[str]) -> int:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(name, before, strict=False))
    return len(name) - sum(1 for _ in same)


def _tensors(path: Path) -> Iterator[tuple[str, RawTensor]]:
    if path.name.endswith(INDEX_SUFFIX):
        for shard in sorted({*weight_map(path).values()}):
            yield from read_raw(path.parent / shard).tensors.items()
    else:
        yield from read_raw(path).tensors.items()


def _submodule(model: nn.Module, path: str, tensors: Mapping[str, RawTensor]) -> nn.Module:
    module = model
    parts = path.split(".") if path else []
    for depth, part in enumerate(parts, 1):
        if part not in module._modules:
            module.add_module(part, _module(".".join(parts[:depth]), tensors))
        module = module.get_submodule(part)
    return module


def _module(path: str, tensors: Mapping[str, RawTensor]) -> nn.Module:
    weight, bias = tensors.get(f"{path}.weight"), tensors.get(f"{path}.bias")
    if weight is None or len(weight.shape) != 2:
        return nn.Module()
    rows, columns = weight.shape
    dtype = DTYPES.get(weight.dtype, torch.float32)
    dtype = dtype if dtype.is_floating_point else torch.float32
    if _EMBEDDING.search(path.rpartition(".")[2]):
        return _blank(nn.Embedding, rows, columns, dtype=dtype)
    if bias is not None and bias.shape == (columns,) != (rows,):
        rows, columns = columns, rows
    return _blank(nn.Linear, columns, rows, bias=bias is not None, dtype=dtype)


_BLANK: dict[type[nn.Module], Any] = {
    kind: type(kind.__name__, (kind,), {"reset_parameters": lambda self: None}) for kind in (nn.Linear, nn.Embedding)
}


def _blank(kind: type[nn.Module], *sizes: int, **options: Any) -> nn.Module:
    """Return a layer without values, and without the time that torch takes to make some up."""
    module: nn.Module = _BLANK[kind](*sizes, device="meta", **options)
    module.__class__ = kind
    return module


def _place(module: nn.Module, name: str, tensor: RawTensor) -> None:
    """Register what the module's class has not brought along."""
    if name in module._parameters:
        return
    dtype = DTYPES.get(tensor.dtype, torch.uint8)
    empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
    if dtype.is_floating_point:
        module.register_parameter(name, nn.Parameter(empty))
    else:
        module.register_buffer(name, empty)
