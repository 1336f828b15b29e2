"""How the calls of a chain of blocks hang together: a tensor between two of them knows what made it."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_fx.capture.calls.ambient import AmbientState
from lora_fx.capture.calls.arguments import rebuild
from lora_fx.capture.calls.objects import tensors_in
from lora_fx.errors import RefusedError
from lora_fx.liveness.rows import LazyRows, whole
from lora_fx.liveness.sources import RowSource
from lora_fx.models.torch_internals import pytree
from lora_fx.regions.checking import REGION, ModuleCall
from lora_fx.regions.prefix.code import BlockCode, BlockForm
from lora_fx.regions.prefix.digests import digest, digest_of, digests_of_rows
from lora_fx.regions.prefix.entries import Entry
from lora_fx.regions.prefix.rows import Arguments, chosen
from lora_fx.regions.prefix.state import Kept
from lora_fx.regions.remaking import remade

_LINK = "lora_fx_link"
"""Attribute of a tensor between two blocks."""


@dataclass(slots=True, eq=False)
class ChainRun:
    """One forward through a chain, from the first block on."""

    firsts: list[bytes]
    """Digest of the first block's call, for each row."""
    apart: bool = True
    alone: bool = True
    """Whether the rows of all blocks so far are kept apart, as `Independence` says it."""
    entries: list[Entry | None] = field(default_factory=list)
    """What was found for each row; empty if nothing was."""
    whole: Entry | None = None
    """What was found for the whole call."""
    waiting: "list[Waiting]" = field(default_factory=list)
    """Calls that have not been made."""
    seen: dict[tuple[int, int], tuple[Tensor, list[bytes]]] = field(default_factory=dict)
    """Digests of arguments that all blocks get: masks, positions."""

    def digests(self, tensor: Tensor, batch: int) -> list[bytes]:
        """Return the digests of a tensor's rows, or the one digest that all rows share."""
        key = id(tensor), tensor._version
        known = self.seen.get(key)
        if known is None:
            of_rows = tensor.dim() > 0 and tensor.shape[0] in (1, batch)
            known = self.seen[key] = tensor, digests_of_rows(tensor) if of_rows else [digest_of(tensor)]
        return known[1]

    @property
    def computes(self) -> bool:
        """Whether nothing is known of what comes of it."""
        return self.whole is None and not self.entries

    def places(self) -> list[tuple[bytes, bytes]]:
        """Return for each row the keys under which it may be kept: alone, or in a batch of this size."""
        batch = str(len(self.firsts))
        return [(digest("alone", first), digest("apart", batch, first)) for first in self.firsts]

    def place_of_all(self) -> bytes:
        return digest("whole", *self.firsts)


@dataclass(slots=True, eq=False)
class Link:
    """What made a tensor: the calls of a run up to here, as a digest for each row."""

    run: ChainRun
    keys: list[bytes]
    version: int


def tie(tensor: Tensor, link: Link) -> None:
    """Let a tensor know what made it."""
    setattr(tensor, _LINK, link)


def link_of(tensor: Tensor) -> Link | None:
    """Return what made a tensor, if it is a block's output and nobody has written to it."""
    if type(tensor) is LazyRows:
        source = tensor.lazy_value.source
        return source.link if isinstance(source, Waiting) and not tensor.lazy_value.is_whole else None
    link: Link | None = getattr(tensor, _LINK, None)
    return link if link is not None and link.version == tensor._version else None


class Waiting(RowSource):
    """The output of a block that need not be computed, as what comes of it is known; and computed for who asks."""

    def __init__(
        self, kept: Kept, call: ModuleCall, code: BlockCode, form: BlockForm, shapes: Any, ambient: AmbientState
    ) -> None:
        self.call, self.code, self.shapes = call, code, shapes
        self.shape, self.dtype, self.device = form.shape, form.dtype, form.device
        self.ambient = ambient
        self.link: Link | None = None
        self._kept = kept
        self._versions = self._now()

    def _now(self) -> list[tuple[int, int]]:
        given = (t for t in tensors_in((self.call.args, self.call.kwargs)) if type(t) is not LazyRows)
        owned = (*given, *self.call.module.parameters(), *self.call.module.buffers())
        return [(id(tensor), tensor._version) for tensor in owned]

    def take(self, rows: Tensor) -> Tensor:
        return self.whole().reshape(-1, self.shape[-1]).index_select(0, rows)

    def whole(self) -> Tensor:
        self._kept.note_asked()
        if self._now() != self._versions:
            raise RefusedError(
                "what lies between two frozen blocks is asked for, and their inputs or weights have changed since",
                advice="read it before, or leave `cached_prefix`",
            )
        call = whole_call(self.call)
        with remade(self.ambient, None):
            if REGION in call.module.__dict__:
                return only_tensor(call.by_forward())
            return only_tensor(call.module.forward(*call.args, **call.kwargs))  # it is no region any more

    def arguments(self, batch: int, rows: Tensor, made: dict[int, Tensor]) -> Arguments:
        """Return the arguments with these rows of the batch; `made` has those of calls before."""
        of_rows = chosen(known_late((self.call.args, self.call.kwargs)), batch, rows)
        return rebuild(*of_rows, lambda value: made[value.number] if isinstance(value, _NotMade) else value)


@dataclass(frozen=True, slots=True)
class _NotMade:
    """Stands for the output of a call that has not been made."""

    number: int


def known_late(arguments: Arguments) -> Arguments:
    """Return arguments with a sign in the place of each output of a call that has not been made."""
    return rebuild(*arguments, lambda v: _NotMade(id(v.lazy_value.source)) if type(v) is LazyRows else v)


def whole_call(call: ModuleCall) -> ModuleCall:
    """Return a call without arguments that are computed late."""
    args, kwargs = pytree.tree_map_only(LazyRows, whole, (call.args, call.kwargs))
    return ModuleCall(call.module, call.forward, args, kwargs)


def form_of(result: Any) -> BlockForm | None:
    """Return what a block returned, if that is one tensor; perhaps the first of a tuple of nothing else."""
    leaves = [result] if isinstance(result, Tensor) else list(result) if type(result) is tuple else []
    plain = bool(leaves) and type(leaves[0]) is Tensor and leaves[0].dim() > 0 and leaves[0].is_contiguous()
    if not plain or any(leaf is not None for leaf in leaves[1:]):
        return None
    length = None if isinstance(result, Tensor) else len(leaves)
    return BlockForm(leaves[0].shape, leaves[0].dtype, leaves[0].device, length)


def only_tensor(result: Any) -> Tensor:
    """Return the one tensor that a block returned."""
    tensor: Tensor = result if isinstance(result, Tensor) else result[0]
    return tensor
