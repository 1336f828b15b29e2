"""What is trained as a state dict, for checkpoints of one's own."""

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import Attached, all_attached
from lora_fx.adapters.placed import is_trained, placed_in
from lora_fx.adapters.tokenrows import IDS, same_ids, told_ids
from lora_fx.adapters.trained import added_rows, added_tensors, parameters_of, trained_owners
from lora_fx.errors import AdapterMismatchError, RefusedError
from lora_fx.models.between import between_calls, one_at_a_time
from lora_fx.models.fsdp import resharded
from lora_fx.models.restoring import write_together
from lora_fx.models.shards import is_finite, is_sharded, part_of
from lora_fx.models.wrappers import seen_through
from lora_fx.tuned.build import held
from lora_fx.tuned.several import adapters_called, refuse_trained_together
from lora_fx.tuned.switching import names_of, refuse_unknown, switches_in


@one_at_a_time
def adapter_state(tuned: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """Return what is trained as a state dict, for a checkpoint of one's own; it shares its memory with the model.

    Its names are those of `tuned.state_dict()`: adapters (A of LoRA-FA too, which was drawn), where PiSSA and its kin
    started, trained biases, rows of tokens with the ids of these, and the modules under `train:` with their buffers,
    each tensor once.  `save` writes files that others read; this is for `torch.save` beside an optimizer's state.

    Args:
        tuned: an adapted model, which stays unchanged.
        adapter: name of the only adapter whose tensors are meant; None means all.  `lora_fx.swap` takes such a state.

    Of a model that FSDP2 shards they are DTensors, which torch.distributed.checkpoint writes and reads on any mesh.

    Raises:
        ValueError: no adapter has the name.
        RefusedError: the model is not adapted; or ZeRO-3 has partitioned it; or parts of the model were trained with
            this adapter and others.
    """
    tuned = resharded(seen_through(tuned))
    state = _whole(tuned)
    if adapter is not None:
        known = names_of(switches_in(tuned))
        refuse_unknown([adapter], known)
        if known != (adapter,):
            refuse_trained_together(tuned, adapter)
            own = {id(tensor) for tensor in _of_one(tuned, adapter)}
            state = {name: tensor for name, tensor in state.items() if id(tensor) in own}
    return {name: tensor.detach() for name, tensor in state.items()} | _ids(tuned, state)


def _ids(tuned: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return of the rows of tokens in a state the ids, by their keys in `tuned.state_dict()`."""
    rows = {id(one.rows): one for _, _, one in added_rows(tuned)}
    return {
        name.removesuffix("rows") + IDS: rows[id(tensor)].get_extra_state()
        for name, tensor in state.items()
        if id(tensor) in rows
    }


def _whole(tuned: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers that belong to adapters or are trained with them, by their names."""
    wanted, places = {id(parameter) for parameter in held(tuned)}, placed_in(tuned)
    state: dict[str, Tensor] = {name: p for name, p in tuned.named_parameters() if id(p) in wanted}
    if lost := [(name, "ZeRO-3 has partitioned it") for name, value in state.items() if value.numel() == 0]:
        advice = "gather them (deepspeed.zero.GatheredParameters)"
        raise RefusedError("this process holds no values of what is trained", lost[:8], advice)
    lasting = tuned.state_dict(keep_vars=True)
    starts = {id(buffer) for _, adapter in all_attached(tuned) for buffer in _buffers_of(adapter)}
    starts |= {id(value) for _, _, value in added_tensors(tuned)}
    kept = {name: buffer for name, buffer in tuned.named_buffers() if name in lasting}
    return state | {name: b for name, b in kept.items() if id(b) in starts or is_trained(name, places)}


def _buffers_of(adapter: Attached) -> Iterator[Tensor]:
    return itertools.chain(adapter.lora_A.buffers(), adapter.lora_B.buffers())


def _of_one(tuned: nn.Module, adapter: str) -> Iterator[Tensor]:
    """Yield the parameters and buffers of one adapter, and what was trained with it alone."""
    for _, one in adapters_called(tuned, adapter):
        yield from one.parameters()
        yield from _buffers_of(one)
    yield from parameters_of(tuned, adapter)
    yield from (value for _, whose, value in added_tensors(tuned) if whose == adapter)
    for _, owner, state in trained_owners(tuned):
        names = (name for name, owners in state.owners.items() if owners and adapter in owners)
        yield from (own for name in names if (own := owner._buffers.get(name)) is not None)


@one_at_a_time
def load_adapter_state(tuned: nn.Module, state: Mapping[str, Tensor], adapter: str | None = None) -> None:
    """Write what `adapter_state` has returned into a model adapted alike, in place: all of it or nothing.

    Args:
        tuned: an adapted model.
        state: of all its adapters; or, with `adapter`, of that one, whose name the state's has to be.  Of a sharded
            model each tensor may also be whole.
        adapter: as for `adapter_state`; other adapters stay as they are.

    Raises:
        ValueError: no adapter has the name.
        AdapterMismatchError: names every tensor that is missing, too much, of another shape, of more bits than the
            model's, or not finite; and rows of other tokens.
        RefusedError: as `adapter_state`.
    """
    own = adapter_state(tuned, adapter)
    pairs = ((name, _differs(name, own.get(name), state.get(name))) for name in {**own, **state})
    if wrong := [(name, *differs) for name, differs in pairs if differs is not None]:
        advice = "give the state of a model that was adapted by the same rules; nothing was loaded"
        raise AdapterMismatchError("the state does not fit this adapted model", wrong, advice)
    with between_calls(tuned):
        write_together(
            [(own[name], part_of(value, own[name])) for name, value in state.items() if not name.endswith(IDS)]
        )  # it is the model's own memory


def _differs(name: str, own: Tensor | None, given: Tensor | None) -> tuple[str, str] | None:
    """Return (what is given, what the model has) where one cannot be copied into the other without loss."""
    if own is None or given is None or not isinstance(given, Tensor):
        return _told(given), _told(own)
    if name.endswith(IDS):
        return None if same_ids(given, own) else (f"tokens {told_ids(given)}", f"tokens {told_ids(own)}")
    narrower = torch.promote_types(own.dtype, given.dtype) != own.dtype
    alike = type(given.detach()) in (type(own), Tensor) if is_sharded(own) else type(own) is type(given.detach())
    if own.is_meta or given.is_meta or narrower or own.shape != given.shape or not alike:
        return _told(given), _told(own)
    if given.is_floating_point() and not is_finite(given):
        return "NaN or infinite values", _told(own)
    return None


def _told(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return "has none" if tensor is None else f"a {type(tensor).__name__}"
    kind = "" if type(tensor.detach()) is Tensor else f" {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device.type}{kind}"
