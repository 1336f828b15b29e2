"""One call of a frozen block: what it is a function of, and why its output may not be kept."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.fused.eligible import is_watched
from lora_fx.capture.calls.ambient import RandomState
from lora_fx.capture.calls.arguments import flatten, positional_names
from lora_fx.capture.calls.objects import is_plain_object, tensors_in
from lora_fx.liveness.rows import LazyRows
from lora_fx.models.layers import has_hooks
from lora_fx.models.swap import original_class
from lora_fx.regions.checking import REGION, ModuleCall
from lora_fx.regions.prefix.chains import why_not_frozen
from lora_fx.regions.prefix.code import BlockCode, modes_of
from lora_fx.regions.prefix.digests import NoDigest, digest, digest_of_kernels, is_plain
from lora_fx.regions.prefix.links import ChainRun, Link, Waiting, link_of
from lora_fx.regions.prefix.state import BlockState
from lora_fx.regions.region import Region
from lora_fx.text import dotted

DRAWS = "it draws random numbers (dropout in train mode)"


@dataclass(slots=True, eq=False)
class Meeting:
    """A call that fits a graph, and what its result is a function of."""

    call: ModuleCall
    code: BlockCode
    inputs: tuple[Any, ...]
    """Those that the graph uses."""
    modes: str
    base: bytes
    """Digest of code, modes, weights and kernels."""
    shapes: tuple[Any, ...]
    link: Link | None
    """What made the hidden states, if that is the block before."""

    def keys(self, run: ChainRun, batch: int) -> list[bytes]:
        """Return for each row the digest of all that it may depend on, if rows are kept apart.

        Raises:
            NoDigest: the number of rows is not that of the block before.
        """
        columns = [[digest(repr(value))] for value in self.inputs if not isinstance(value, Tensor)]
        for value in (value for value in self.inputs if isinstance(value, Tensor)):
            link = link_of(value)
            columns.append(run.digests(value, batch) if link is None or link.run is not run else link.keys)
        if any(len(column) not in (1, batch) for column in columns):
            raise NoDigest("the number of rows changes between blocks")
        return [
            digest(self.base, *(column[row if len(column) > 1 else 0] for column in columns)) for row in range(batch)
        ]


def around(state: BlockState, call: ModuleCall) -> str:
    """Return why a call goes by what is kept, whatever its graph is; empty if it does not."""
    if is_watched():
        return "something follows operations one by one, or all modules"
    for path, module in call.module.named_modules():
        if has_hooks(module):
            return f"a hook on {dotted(state.path, path)}"
    frozen = why_not_frozen(call.module)
    if frozen:
        return f"{state.path}: {frozen}"
    for leaf in flatten(call.args, call.kwargs).leaves:
        reason = _reason_of(leaf.value)
        if reason:
            return f"argument {_name(call, leaf.value)} {reason}"
    return ""


def _reason_of(value: object) -> str:
    """Return why an argument cannot be known by its bytes; empty if it can."""
    if type(value) is LazyRows:
        known = isinstance(value.lazy_value.source, Waiting) or value.lazy_value.is_whole
        return "" if known else "is computed late"
    if isinstance(value, Tensor):
        if value.requires_grad:
            return "requires a gradient (as transformers' checkpointing wants it? disable_input_require_grads())"
        return "" if is_plain(value) else "is no plain tensor"
    if next(tensors_in(value), None) is not None or is_plain_object(value):
        return f"is a {type(value).__name__} (of keys and values? pass use_cache=False)"
    return ""


def _name(call: ModuleCall, value: object) -> str:
    flat = flatten(call.args, call.kwargs, positional_names(original_class(call.module).forward)[1:])
    return next(leaf.name for leaf in flat.leaves if leaf.value is value)


def region_at(module: nn.Module) -> Region:
    region: Region = module.__dict__[REGION]
    return region


def met(state: BlockState, call: ModuleCall) -> Meeting | str:
    """Return what a call is a function of, or why it is not known to be one."""
    assert state.kept is not None
    region = region_at(call.module)
    hit = region.find(call.module, call.args, call.kwargs)
    if hit is None:
        if not region.enabled:
            return "graphs are switched off"
        return region.why_missed(call)
    code = state.kept.code_of(hit[0], call.module)
    if code.refused:
        return code.refused
    inputs = tuple(value for value, is_read in zip(hit[1], code.read, strict=True) if is_read)
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    modes = modes_of(call.module, code)
    if modes in code.draws:
        return DRAWS
    try:
        owned = state.owned.digest(call.module, hit[0])
        base = digest(code.digest, owned, modes, digest_of_kernels({tensor.device for tensor in tensors}))
    except NoDigest as reason:
        return f"{state.path}: {reason}"
    shapes = tuple((value.shape, value.dtype) if isinstance(value, Tensor) else value for value in inputs)
    links = [link for tensor in tensors if (link := link_of(tensor)) is not None]
    return Meeting(call, code, inputs, modes, base, shapes, links[0] if links else None)


class Watch:
    """Sees whether a forward draws random numbers, or writes to what it is given or owns."""

    def __init__(self, call: ModuleCall) -> None:
        self._tensors = [t for t in tensors_in((call.args, call.kwargs)) if type(t) is not LazyRows]
        self._tensors += [*call.module.parameters(), *call.module.buffers()]
        devices = {tensor.device for tensor in self._tensors}
        self._devices = tuple(sorted(devices, key=str))
        self._versions = [tensor._version for tensor in self._tensors]
        self._random = RandomState(self._devices)
        self.drew = False

    def reason(self) -> str:
        """Return what the forward did since besides computing its result; empty if nothing."""
        self.drew = RandomState(self._devices) != self._random
        if self.drew:
            return DRAWS
        if [tensor._version for tensor in self._tensors] != self._versions:
            return "it writes to its buffers or arguments (batch norm in train mode)"
        return ""


def devices_of(call: ModuleCall) -> set[torch.device]:
    return {tensor.device for tensor in (*tensors_in((call.args, call.kwargs)), *call.module.parameters())}
