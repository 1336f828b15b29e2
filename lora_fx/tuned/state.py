"""What is trained as a state dict, for checkpoints of one's own."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import all_attached
from lora_fx.adapters.placed import is_trained, placed_in
from lora_fx.adapters.trained import added_tensors
from lora_fx.errors import AdapterMismatchError
from lora_fx.models.wrappers import seen_through
from lora_fx.tuned.build import trainable


def adapter_state(tuned: nn.Module) -> dict[str, Tensor]:
    """Return what is trained as a state dict, for a checkpoint of one's own; it shares its memory with the model.

    Its names are those of `tuned.state_dict()`: adapters, where PiSSA and its kin started, trained biases, and the
    modules under `train:` with their buffers, each tensor once.  `save` writes files that others read; this is for
    `torch.save` beside an optimizer's state.

    Raises:
        RefusedError: the model is not adapted.
    """
    tuned = seen_through(tuned)
    wanted, places = {id(parameter) for parameter in trainable(tuned)}, placed_in(tuned)
    state = {name: parameter.detach() for name, parameter in tuned.named_parameters() if id(parameter) in wanted}
    lasting = tuned.state_dict(keep_vars=True)
    factors = [factor for _, adapter in all_attached(tuned) for factor in (adapter.lora_A, adapter.lora_B)]
    starts = {id(buffer) for factor in factors for buffer in factor.buffers()}
    starts |= {id(value) for _, _, value in added_tensors(tuned)}
    kept = {name: buffer for name, buffer in tuned.named_buffers() if name in lasting}
    return state | {name: b for name, b in kept.items() if id(b) in starts or is_trained(name, places)}


def load_adapter_state(tuned: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write what `adapter_state` has returned into a model adapted alike, in place: all of it or nothing.

    Raises:
        AdapterMismatchError: names every tensor that is missing, too much, of another shape, of more bits than the
            model's, or not finite.
        RefusedError: the model is not adapted.
    """
    own = adapter_state(tuned)
    pairs = ((name, _differs(own.get(name), state.get(name))) for name in {**own, **state})
    if wrong := [(name, *differs) for name, differs in pairs if differs is not None]:
        advice = "give the state of a model that was adapted by the same rules; nothing was loaded"
        raise AdapterMismatchError("the state does not fit this adapted model", wrong, advice)
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)  # it is the model's own memory


def _differs(own: Tensor | None, given: Tensor | None) -> tuple[str, str] | None:
    """Return (what is given, what the model has) where one cannot be copied into the other without loss."""
    if own is None or given is None or not isinstance(given, Tensor):
        return _told(given), _told(own)
    narrower = torch.promote_types(own.dtype, given.dtype) != own.dtype
    if own.is_meta or given.is_meta or narrower or own.shape != given.shape or type(own) is not type(given.detach()):
        return _told(given), _told(own)
    if given.is_floating_point() and not bool(torch.isfinite(given).all()):
        return "NaN or infinite values", _told(own)
    return None


def _told(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return "has none" if tensor is None else f"a {type(tensor).__name__}"
    kind = "" if type(tensor.detach()) is Tensor else f" {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device.type}{kind}"
