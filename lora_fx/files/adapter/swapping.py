"""Other values for an adapter that a model has, in place: nothing is captured or compiled again."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import HOME, Attached
from lora_fx.adapters.factors.moved import MovedA, MovedB
from lora_fx.errors import AdapterMismatchError, RefusedError
from lora_fx.files.adapter import peftfiles
from lora_fx.files.adapter.codec import as_plain, filled, scaled
from lora_fx.files.adapter.keptbase import base_of
from lora_fx.files.adapter.keptfile import Stamp, stamp_of
from lora_fx.files.adapter.plainfile import copies_again, plain_file_copies
from lora_fx.files.adapter.plainstate import plain_copies
from lora_fx.files.adapter.read import AdapterFile, read_adapters
from lora_fx.files.adapter.resolve import resolved
from lora_fx.files.adapter.restore import check, name_of, slices_in
from lora_fx.files.adapter.site import SavedSite
from lora_fx.models.between import between_calls, one_at_a_time
from lora_fx.models.fsdp import has_parts, resharded
from lora_fx.models.restoring import write_together
from lora_fx.models.shards import part_of, unsharded
from lora_fx.models.tensors import dotted
from lora_fx.models.together import copied_together, surely_finite
from lora_fx.models.wrappers import seen_through, without_wrappers
from lora_fx.planning.sites import CONVOLUTIONS
from lora_fx.text import listing
from lora_fx.tuned.build import whole_record_in
from lora_fx.tuned.several import adapters_called, known_switches, trained_beside

Mismatch = tuple[str, str, str]
Copies = list[tuple[Tensor, Tensor]]
"""What is written where."""


@one_at_a_time
def swap(tuned: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor], *, adapter: str) -> None:
    """Give an adapter of a model other values, in place: its tensors stay where they are, and so does what uses them.

    Nothing is captured or compiled again.  Calls of the model in other threads end before, or begin after the change
    (each token of `generate` is a call, and compiled code does not wait).  A lower rank than the adapter's is filled up
    with zeros; where a file has another scaling, B is multiplied by its ratio to the adapter's.  Dropout stays the
    adapter's.  Every process calls it that holds a part of the model, with the same values.

    Args:
        tuned: an adapted model.
        source: the directory of a saved adapter for the same sites; or a state as `adapter_state` returns it, of this
            adapter or of the only one in it, with the same scalings.  Of several adapters the one of this name is
            taken.
        adapter: the name of the adapter.

    Raises:
        ValueError: the model has no adapter of the name, or the source several and none of the name.
        AdapterMismatchError: names every tensor or site that is missing, too much, of a rank above the adapter's, of
            other slices, DoRA in place of plain LoRA or the reverse, not finite, or of another base.
        AdapterFileError: as `load`.
        RefusedError: the file holds biases, rows of embeddings or modules that are trained whole, or the adapter has
            such; the adapter has no values here.  In all these cases nothing has changed.
    """
    tuned = seen_through(tuned)
    is_whole = any(switch.whole for switch in known_switches(tuned, adapter))
    if isinstance(source, Mapping) and not all(issubclass(kind, str) for kind in set(map(type, source))):
        raise ValueError("a state has tensors by name, and keys of this one are no names")
    stamp = None if isinstance(source, Mapping) or is_whole else stamp_of(source)
    if not is_whole and (plain := _plain(tuned, source, adapter, stamp)) is not None:
        with between_calls(tuned):
            copied_together(*plain)
        return
    files = [] if isinstance(source, Mapping) else read_adapters(source)
    if len(files) == 1 and not is_whole and (fitting := plain_file_copies(tuned, files[0], adapter, stamp)) is not None:
        with between_calls(tuned):
            write_together(fitting)
        return
    sharded = has_parts(tuned)
    if sharded:
        resharded(tuned)
        source = {k: unsharded(v) for k, v in source.items()} if isinstance(source, Mapping) else source
    slots = list(adapters_called(tuned, adapter))
    if lost := [(path, "on the meta device") for path, one in slots if one.lora_A.weight.is_meta]:
        raise RefusedError("the adapter has no values here that could be replaced", lost)
    if isinstance(source, Mapping):
        copies = _from_state(slots, source, adapter)
    else:
        copies = from_file(slots, _file(tuned, files, adapter))
    if is_whole:
        _refuse_beside(tuned, slots, adapter)
    if sharded:
        copies = [(target, part_of(value, target)) for target, value in copies]
    with between_calls(tuned):
        write_together(copies)


def _plain(
    tuned: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor], adapter: str, stamp: Stamp | None
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return the tensors of an adapter and the values for them, where these can be copied as they are."""
    if isinstance(source, Mapping):
        return plain_copies(tuned, source, adapter)
    return copies_again(tuned, stamp, adapter)


def _refuse_beside(tuned: nn.Module, slots: list[tuple[str, Attached]], adapter: str) -> None:
    """Raise RefusedError for an adapter of which more is trained than A and B: what is left would be another one's."""
    facts = [(path, f"'{adapter}' trains its bias") for path, one in slots if one.trained_bias is not None]
    facts += trained_beside(tuned, whole_record_in(tuned), (adapter,))
    if facts:
        advice = "lora_fx.load_adapter_state takes all of them; or drop it, and lora_fx.add the other one"
        raise RefusedError(
            "more of the adapter is trained than what a swap replaces; nothing was changed", facts, advice
        )


# -- of a state


_KEY = re.compile(
    r"(?P<home>(?:.+\.)?(?:lora_A|lora_B|lora_magnitude_vector))\.(?P<name>[^.]+)(?P<rest>(?:\.\d+)?\.\w+)"
)


def _from_state(slots: list[tuple[str, Attached]], state: Mapping[str, Tensor], adapter: str) -> Copies:
    places: dict[str, tuple[Tensor, int | None]] = {}
    named: dict[str, tuple[str, str]] = {}
    for path, one in slots:
        for home, rest, tensor, axis in _tensors(without_wrappers(path), one):
            places[home + rest], named[home + rest] = (tensor, axis), (home, rest)
    given = _in_full(state, named, adapter) or _of_one(state, adapter)
    pairs = [(key, *places.get(key, (None, None)), given.get(key)) for key in dict.fromkeys((*places, *given))]
    _raise_if(wrong for pair in pairs if (wrong := _wrong(*pair)) is not None)
    if not _all_finite(given):
        found = [(key, "NaN or infinite values", "") for key, value in given.items() if not _all_finite({key: value})]
        _raise_if(found)
    return [(mine, filled(value, mine)) for _, mine, _, value in pairs if mine is not None and value is not None]


def _tensors(path: str, one: Attached) -> Iterator[tuple[str, str, Tensor, int | None]]:
    """Yield (key before the adapter's name, rest of the key, tensor, axis of its rank if that may be less).

    For example `blocks.0.q.lora_A` and `.weight`.
    """
    spec, call = one.spec, "" if one.call is None else f".{one.call}"
    home = path if spec.path_is_owner else path + HOME
    first, second = (0, 1) if spec.site.op in CONVOLUTIONS else (-2, -1)
    for name, factor, axis in (("lora_A", one.lora_A, first), ("lora_B", one.lora_B, second)):
        is_moved = isinstance(factor, MovedA | MovedB)
        yield dotted(home, name), f"{call}.weight", factor.weight, None if spec.parts or is_moved else axis
        if isinstance(factor, MovedA | MovedB):
            yield dotted(home, name), f"{call}.start", factor.start, None
    if one.magnitude is not None:
        yield dotted(home, "lora_magnitude_vector"), ".weight", one.magnitude.weight, None


def _in_full(
    state: Mapping[str, Tensor], named: Mapping[str, tuple[str, str]], adapter: str
) -> dict[str, Tensor] | None:
    """Return a state by its keys without the adapter's name, if it has just those of one adapter; else None."""
    first = _KEY.fullmatch(next(iter(state), ""))
    for name in () if first is None or len(state) != len(named) else dict.fromkeys((adapter, first["name"])):
        found = {key: state.get(f"{home}.{name}{rest}") for key, (home, rest) in named.items()}
        whole = {key: value for key, value in found.items() if value is not None}
        if len(whole) == len(named):
            return whole
    return None


def _of_one(state: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """Return the tensors of one adapter in a state, by their keys without its name."""
    found = {key: match for key in state if (match := _KEY.fullmatch(without_wrappers(key)))}
    names = list(dict.fromkeys(match["name"] for match in found.values()))
    if len(names) > 1 and adapter not in names:
        raise ValueError(f"the state has adapters {', '.join(names)}, and none is called '{adapter}'")
    name = adapter if adapter in names else names[0] if names else ""
    given = {f"{m['home']}{m['rest']}": state[key] for key, m in found.items() if m["name"] == name}
    return given | {key: value for key, value in state.items() if key not in found}


def _wrong(key: str, own: Tensor | None, axis: int | None, given: object) -> Mismatch | None:
    if own is None or not isinstance(given, Tensor) or given.dim() != own.dim():
        return key, _told(given), _told(own)
    expected = list(own.shape)
    if axis is not None:
        expected[axis] = min(expected[axis], given.shape[axis])
    narrower = own.dtype != given.dtype and (
        given.dtype.itemsize == 1 or torch.promote_types(own.dtype, given.dtype) != own.dtype  # no 8-bit float has one
    )
    wrong = given.is_meta or narrower or list(given.shape) != expected
    return (key, _told(given), _told(own)) if wrong else None


def _told(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return "has none" if tensor is None else f"a {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all values are finite."""
    return surely_finite(tensors.values()) or all(bool(tensor.isfinite().all()) for tensor in tensors.values())


# -- of a file


def _file(tuned: nn.Module, read: Sequence[AdapterFile], adapter: str) -> AdapterFile:
    """Return the adapter of that name out of a directory's, or the only one, checked against the base of the model."""
    base, inventory = base_of(tuned)
    files = resolved(read, base)
    named = [file for file in files if name_of(file) == adapter] or files
    if len(named) > 1:
        names = ", ".join(map(name_of, files))
        raise ValueError(f"the directory has adapters {names}, and none is called '{adapter}'")
    peftfiles.warn_of_missing(named[0], base)
    check(named, inventory, base)
    refuse_more(named[0])
    return named[0]


def refuse_more(file: AdapterFile) -> None:
    """Raise RefusedError for a file with biases, rows or modules trained whole, or for a base that PEFT changes."""
    facts = [(name, "is trained whole") for name in file.header.trained]
    facts += [(path, "has rows that are trained") for path in file.rows]
    facts += [(name, "is trained") for name in file.biases]
    facts += [(s.path, "its bias is trained") for s in file.sites if s.bias is not None or s.added_bias is not None]
    facts += [(s.path, "starts at parts of the weight that PEFT makes anew") for s in file.sites if s.on_residual]
    if facts:
        raise RefusedError("the file has more than values for an adapter", facts, "lora_fx.load it")


@dataclass(frozen=True, slots=True)
class _Pair:
    """A site of the file, and the adapter of the model that takes its values."""

    slot: Attached
    saved: SavedSite

    def wrong(self) -> tuple[str, str] | None:
        """Return (what the file has, what the adapter has) where one cannot hold the other."""
        saved, spec = self.saved, self.slot.spec
        if (saved.magnitude is None) != (self.slot.magnitude is None):
            kinds = ("plain LoRA", "DoRA")
            return kinds[saved.magnitude is not None], kinds[self.slot.magnitude is not None]
        if saved.lora.invocation != spec.lora.invocation:
            return _invoked(saved.lora.invocation), _invoked(spec.lora.invocation)
        slices = slices_in(saved)
        parts = () if slices is None else slices.rows(spec.site.features[0])
        if parts != spec.parts:
            return "other slices", f"{len(spec.parts)} parts" if spec.parts else "the whole weight"
        if spec.lora.share not in ("none", saved.lora.share):
            return f"lora_{spec.lora.share} for each expert", "one for all"
        rank = self.rank
        if rank > spec.rank or (parts and rank != spec.rank):
            return f"rank {rank}", f"rank {spec.rank}"
        return ("scaling", "0, which B cannot make up for") if not spec.scaling and saved.lora.scaling else None

    @property
    def rank(self) -> int:
        """The inner dimension of the product in the file."""
        A = as_plain(self.slot, self.saved.lora_A, self.saved.lora_B)[0]
        return A.shape[0 if self.slot.spec.site.op in CONVOLUTIONS else -2]

    def copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what is written where."""
        one, saved = self.slot, self.saved
        A, B = as_plain(one, saved.lora_A, saved.lora_B)
        if saved.lora.scaling != one.spec.scaling:
            B = scaled(B, saved.lora.scaling / one.spec.scaling)
        targets: list[tuple[Tensor, Tensor]] = []
        if isinstance(one.lora_A, MovedA) and isinstance(one.lora_B, MovedB):
            r = one.lora_A.weight.shape[0]
            A, B = filled(A, A.new_zeros(2 * r, A.shape[1])), filled(B, B.new_zeros(B.shape[0], 2 * r))
            targets = [(one.lora_A.start, A[r:]), (one.lora_B.start, -B[:, r:])]
            A, B = A[:r], B[:, :r]
        targets += [(one.lora_A.weight, one.lora_A.values_of(A)), (one.lora_B.weight, one.lora_B.values_of(B))]
        if one.magnitude is not None and saved.magnitude is not None:
            targets.append((one.magnitude.weight, one.magnitude.taken(saved.magnitude)))
        for target, value in targets:
            yield target, filled(value.to(target.device, target.dtype), target)


def _invoked(invocation: tuple[int, ...]) -> str:
    return f"acts from tokens {listing(map(str, invocation))} on" if invocation else "acts on every token"


def from_file(slots: list[tuple[str, Attached]], file: AdapterFile) -> Copies:
    """Return what a file writes into the adapters of a model that have its sites.

    Raises:
        AdapterMismatchError: they do not fit.
    """
    named = {
        (name, one.call): one
        for path, one in slots
        for name in {path, one.spec.path, without_wrappers(path), *one.spec.site.paths}
    }
    pairs = [_Pair(named[saved.path, saved.call], saved) for saved in file.sites if (saved.path, saved.call) in named]
    wrong = [(saved.path, "an adapter", "has none") for saved in file.sites if (saved.path, saved.call) not in named]
    taken = {id(pair.slot.lora_A) for pair in pairs}
    wrong += [(path, "has none", "an adapter") for path, one in slots if id(one.lora_A) not in taken]
    wrong += [(pair.saved.path, *facts) for pair in pairs if (facts := pair.wrong()) is not None]
    _raise_if(wrong)
    return [copy for pair in pairs for copy in pair.copies()]


def _raise_if(wrong: Iterable[Mismatch]) -> None:
    if found := list(wrong):
        advice = "lora_fx.add puts it beside; add(…, rank=…) leaves room for higher ranks"
        raise AdapterMismatchError("the values do not fit this adapter; nothing was changed", found, advice)
