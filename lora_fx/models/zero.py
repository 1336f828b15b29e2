"""Parameters that DeepSpeed's ZeRO-3 has partitioned."""

from torch import Tensor, nn


def partitioned(model: nn.Module) -> list[tuple[str, str]]:
    """Return (name, why) of each parameter that DeepSpeed's ZeRO-3 has taken away but for a part."""
    named = model.named_parameters(remove_duplicate=False)
    return [(name, f"ZeRO-3 has partitioned it, {list(p.shape)}") for name, p in named if is_partitioned(p)]


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has left an empty tensor in the place of a parameter."""
    held = all(getattr(parameter, name, None) is not None for name in ("ds_id", "ds_tensor"))
    return held and parameter.numel() == 0  # lazy parameters have no number of elements: asked last


def numbers_in(parameter: Tensor) -> int:
    """Return how many numbers a parameter has, on all processes together."""
    if is_partitioned(parameter):
        number: int = parameter.ds_numel  # type: ignore[attr-defined]
        return number
    return parameter.numel()
