"""‖ΔW‖ of every adapter of a model, while it is trained: no base weight is read, and no product B A is formed."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import Attached, all_attached
from lora_fx.adapters.factors.moved import MovedFactor
from lora_fx.adapters.norms import product_square, wide_matrices
from lora_fx.adapters.placed import placed_in
from lora_fx.errors import RefusedError
from lora_fx.graphdiff.deltas.heatmaps import places_of
from lora_fx.models.shards import is_sharded
from lora_fx.models.wrappers import seen_through, without_wrappers
from lora_fx.training.history import RecordedSite
from lora_fx.tuned.build import record_in


@dataclass(frozen=True, slots=True)
class Watched:
    """The adapters of a model, and what a record calls them."""

    root: nn.Module
    model: str
    sites: tuple[RecordedSite, ...]
    adapters: tuple[Attached, ...]


def watched_in(tuned: nn.Module) -> Watched:
    """Return the adapters of a model, of one inside of wrappers, or of one that a module holds.

    Their paths are those of the adapted model itself, so that they are the same whatever holds it; of several adapted
    models in one module they are the module's.

    Raises:
        RefusedError: the model is not adapted, its adapters have no values, or each process holds pieces of them.
    """
    root = seen_through(tuned)
    record_in(root)
    places, found = placed_in(root), list(all_attached(root))
    paths = [without_wrappers(path) for path, _ in found]
    if len(places) == 1:
        paths = [places[0].recorded(path) or path for path in paths]
    several = len({adapter.spec.adapter for _, adapter in found}) > 1
    sites = tuple(
        RecordedSite(
            path,
            spec.rule,
            spec.lora.r,
            float(spec.scaling),
            layer or path,
            adapter.call,
            spec.adapter if several else "",
        )
        for path, (_, adapter), (layer, _) in zip(paths, found, places_of(paths), strict=True)
        if (spec := adapter.spec)
    )
    watched = Watched(
        root=root,
        model=", ".join(place.record.plan.model for place in places),
        sites=sites,
        adapters=tuple(adapter for _, adapter in found),
    )
    refuse_unreadable(watched)
    return watched


def refuse_unreadable(watched: Watched) -> None:
    """Refuse adapters whose values are not here.

    Raises:
        RefusedError: with every such site.
    """
    held = [path for path, module in watched.root.named_modules() if "_fsdp_wrapped_module" in module._modules]
    if held:
        raise RefusedError(
            "FSDP1 holds parameters of this model flattened and sharded",
            [(path or "(root)", "is inside of FSDP1") for path in held],
            "use fully_shard (FSDP2)",
        )
    lost = [
        (site.name, reason)
        for site, adapter in zip(watched.sites, watched.adapters, strict=True)
        if (reason := _unreadable(adapter.lora_A.weight) or _unreadable(adapter.lora_B.weight))
    ]
    if lost:
        raise RefusedError("the adapters have no values to record", lost, "record where each process holds them whole")


def _unreadable(weight: Tensor) -> str:
    if weight.is_meta:
        return "its adapter is on the meta device"
    if weight.dim() < 2 or weight.numel() == 0:
        return f"this process holds a piece of it, {list(weight.shape)}"
    return ""


def norms_of(watched: Watched) -> list[float]:
    """Return ‖ΔW‖ = |scaling| · ‖B A‖ (Frobenius) of each site, of DoRA without its magnitude; waits once for a device.

    Where parameters are sharded (DTensor), every process must call it.

    Raises:
        RefusedError: as `watched_in`.
    """
    refuse_unreadable(watched)
    with torch.no_grad():
        squares = [product_square(*wide_matrices(adapter)) for adapter in watched.adapters]
        device = squares[0].device
        roots = torch.stack([square.to(device) for square in squares]).clamp_min(0).sqrt().tolist()
    return [abs(site.scaling) * root for site, root in zip(watched.sites, roots, strict=True)]


def are_sharded(watched: Watched) -> bool:
    """Whether processes hold parts of the adapters, and must read them together."""
    weights = (factor.weight.detach() for each in watched.adapters for factor in (each.lora_A, each.lora_B))
    return any(map(is_sharded, weights))


def are_untrained(watched: Watched) -> bool:
    """Whether every B is as `apply` leaves it, 0 or its start; of sharded ones the part that this process holds."""
    factors = [adapter.lora_B for adapter in watched.adapters]
    moved = [factor for factor in factors if isinstance(factor, MovedFactor)]
    if any(is_sharded(factor.weight) or not torch.equal(factor.weight, factor.start) for factor in moved):
        return False
    weights = [factor.weight.detach() for factor in factors if factor not in moved]
    mine = [weight.to_local() if is_sharded(weight) else weight for weight in weights]  # type: ignore[attr-defined]
    return not any(bool(weight.any()) for weight in mine)
