"""Where adapters start that are made from more than random numbers: parts of their weights."""

from collections.abc import Collection

from torch import Tensor, nn

from lora_fx.adapters.attach import Attached, all_attached
from lora_fx.adapters.factors.decompositions import decomposed
from lora_fx.adapters.factors.lora import as_rows
from lora_fx.adapters.factors.moved import MovedA, MovedB
from lora_fx.errors import RefusedError
from lora_fx.models.quantised import dense
from lora_fx.progress.steps import step


def start_from_weights(twin: nn.Module, names: Collection[str]) -> None:
    """Give every moved adapter of these names its first values, parts of its weight, in place.

    On the meta device there are none.
    """
    moved = [(path, one) for path, one in all_attached(twin) if is_moved(one) and one.spec.adapter in names]
    if moved:
        with step("decomposing", len(moved), "weights") as doing:
            for path, adapter in moved:
                start_from_weight(adapter)
                doing.advance(path)


def is_moved(adapter: Attached) -> bool:
    """Whether the adapter starts away from zero, and what it starts at is taken away again."""
    return isinstance(adapter.lora_A, MovedA)


def start_from_weight(adapter: Attached) -> None:
    """Let a moved adapter start at parts of its weight, in place."""
    spec, A, B = adapter.spec, adapter.lora_A, adapter.lora_B
    if A.weight.is_meta:
        return
    assert isinstance(A, MovedA)
    assert isinstance(B, MovedB)
    weight = weight_of(adapter)
    if weight.shape != spec.site.features or not weight.is_floating_point():
        found = f"{weight.dtype} {list(weight.shape)} in place of {list(spec.site.features)}"
        raise RefusedError(f"init {spec.lora.init} needs the numbers of the weights", [(spec.path, found)])
    first, second = decomposed(spec.lora.init, weight, spec.lora.r, spec.scaling)
    A.begin(first)
    B.begin(second)


def weight_of(adapter: Attached) -> Tensor:
    """Return the base weight of an adapter as plain numbers [out, in], on the device of the adapter."""
    rows: Tensor = as_rows(dense(adapter.base_weight), adapter.spec.site.layout)
    return rows.detach().to(adapter.lora_A.weight.device)
