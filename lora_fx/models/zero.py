"""Parameters that DeepSpeed's ZeRO-3 has partitioned."""

from torch import Tensor, nn

from lora_fx.models.walking import all_parameters_of


def partitioned(model: nn.Module) -> list[tuple[str, str]]:
    """Return (name, why) of each parameter that DeepSpeed's ZeRO-3 has taken away but for a part."""
    named = all_parameters_of(model)
    return [(name, f"ZeRO-3 has partitioned it, {list(p.shape)}") for name, p in named if is_partitioned(p)]


def of_zero3(model: nn.Module) -> list[tuple[str, str]]:
    """Return (name, why) of each parameter that is ZeRO-3's, those that it has gathered for a while among them."""
    named = all_parameters_of(model)
    return partitioned(model) or [(n, "ZeRO-3 has gathered it for a while") for n, p in named if is_of_zero3(p)]


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has left an empty tensor in the place of a parameter."""
    return is_of_zero3(parameter) and parameter.numel() == 0  # lazy parameters have no number of elements: asked last


def is_of_zero3(parameter: Tensor) -> bool:
    """Whether a parameter is ZeRO-3's, which has hooks on each module that it finds its parameters by."""
    return getattr(parameter, "ds_id", None) is not None and getattr(parameter, "ds_tensor", None) is not None


def numbers_in(parameter: Tensor) -> int:
    """Return how many numbers a parameter has, on all processes together."""
    if is_partitioned(parameter):
        number: int = parameter.ds_numel  # type: ignore[attr-defined]
        return number
    return parameter.numel()
