"""Operators that meet the same shapes again on the meta device are answered from what they gave the first time."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_fx.bench.counters import flops_of
from lora_fx.meshes.remembered import RememberedKernels


class Remembering(TorchDispatchMode):
    """Asks what is remembered; knows which operators ran all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []
        self.flops: list[int] = []
        self._kernels = RememberedKernels(self._run, flops_of)

    def _run(self, func, args, kwargs):
        self.ran.append(func._overloadpacket.__name__)
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, flops = self._kernels.call(func, args, kwargs or {})
        self.flops.append(flops)
        return result


def whole(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def facts(result):
    made = [result] if isinstance(result, torch.Tensor) else result
    return type(result), [(one.shape, one.stride(), one.dtype, one.untyped_storage().nbytes()) for one in made]


AGAIN = {
    "mm": lambda: whole(3, 4).mm(whole(4, 5)),
    "of a view": lambda: whole(3, 4).mm(whole(5, 4).t()),
    "another dtype": lambda: whole(3, 4).to(torch.float64),
    "a number": lambda: whole(3) * 2,
    "whole numbers": lambda: whole(3, dtype=torch.int64) * 2,
    "a real number": lambda: whole(3, dtype=torch.int64) * 2.0,
    "a truth value": lambda: whole(3, dtype=torch.bool) * True,
    "several": lambda: whole(3, 4).max(dim=1),
    "a tuple": lambda: torch.ops.aten.native_layer_norm(whole(3, 4), [4], None, None, 1e-5),
    "a list": lambda: torch.cat([whole(3), whole(4)]),
    "strides": lambda: whole(3, 4).t().clone(),
    "no result's numbers": lambda: whole(3, 4)[:0].sum(0),
    "views": lambda: whole(3, 4).view(12)[2:],
    "a view in all but name": lambda: torch.ops.aten._unsafe_view(whole(3, 4), [12]),
    "complex": lambda: torch.view_as_complex(whole(3, 2)) * 2,
    "numbers that count": lambda: torch.ops.aten.split_with_sizes_copy(whole(5), [2, 3]),
}


def test_what_is_remembered_is_what_torch_gives():
    with Remembering():
        first, again = ({what: facts(make()) for what, make in AGAIN.items()} for _ in range(2))
    assert first == again == {what: facts(make()) for what, make in AGAIN.items()}


def test_only_the_first_product_of_each_shape_is_worked_out():
    with Remembering() as mode:
        a, b = whole(3, 4), whole(4, 5)
        one, other, longer = a.mm(b), a.mm(b), whole(7, 4).mm(b)
    assert mode.ran.count("mm") == 2
    assert one.untyped_storage()._cdata != other.untyped_storage()._cdata
    assert longer.shape == (7, 5)
    assert [flops for flops in mode.flops if flops] == [2 * 3 * 4 * 5, 2 * 3 * 4 * 5, 2 * 7 * 4 * 5]


def test_what_is_written_to_is_given_back_itself():
    with Remembering() as mode:
        x, out = whole(3, 5), whole(3, 5)
        for _ in range(2):
            assert x.addmm_(whole(3, 4), whole(4, 5)) is x
            assert torch.mm(whole(3, 4), whole(4, 5), out=out) is out
    assert mode.ran.count("addmm_") == mode.ran.count("mm") == 1


def test_what_changes_a_shape_or_a_storage_runs_each_time():
    with Remembering() as mode:
        for _ in range(2):
            x, y = whole(3, 4), whole(3, 4)
            x.t_()
            assert x.shape == (4, 3)
            y.set_(x)
            assert y.shape == (4, 3)
            assert y.untyped_storage()._cdata == x.untyped_storage()._cdata
            view = torch.ops.aten._unsafe_view(y, [4, 3])
            assert view.untyped_storage()._cdata == y.untyped_storage()._cdata
    assert [mode.ran.count(name) for name in ("t_", "set_", "_unsafe_view")] == [2, 2, 2]


def test_values_are_never_remembered():
    with Remembering() as mode:
        found = [torch.full((2,), 1.0) + torch.tensor(float(number)) for number in range(2)]
    assert torch.equal(found[1], torch.tensor([2.0, 2.0]))
    assert mode.ran.count("add") == 2
