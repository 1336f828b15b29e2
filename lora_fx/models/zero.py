"""Parameters that DeepSpeed's ZeRO-3 has partitioned."""

from torch import Tensor, nn

from lora_fx.models.walking import all_parameters_of


def partitioned(model: nn.Module) -> list[tuple[str, str]]:
    """Return (name, why) of each parameter that DeepSpeed's ZeRO-3 has taken away but for a part."""
    named = all_parameters_of(model)
    return [(name, f"ZeRO-3 has partitioned it, {list(p.shape)}") for name, p in named if is_partitioned(p)]


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has left an empty tensor in the place of a parameter."""
    held = getattr(parameter, "ds_id", None) is not None and getattr(parameter, "ds_tensor", None) is not None
    return held and parameter.numel() == 0  # lazy parameters have no number of elements: asked last


def numbers_in(parameter: Tensor) -> int:
    """Return how many numbers a parameter has, on all processes together."""
    if is_partitioned(parameter):
        number: int = parameter.ds_numel  # type: ignore[attr-defined]
        return number
    return parameter.numel()
