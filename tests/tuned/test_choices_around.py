"""What surrounds a model with several adapters follows which of them are used: compilers, replicas, exports."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import replicate

import lora_fx
from tests.support.twoadapters import BACKENDS, given, model, two


def outputs(tuned: nn.Module) -> dict[str | None, Tensor]:
    """Return what the model computes with each of its adapters and without."""
    found: dict[str | None, Tensor] = {}
    for name in ("a", "b", None):
        with lora_fx.use(tuned, name):
            found[name] = tuned(given())
    return found


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own, where code is compiled in parts
@BACKENDS
def test_compiled_code_follows_the_choice_of_the_thread_that_runs_it(inputs):
    torch.compiler.reset()
    tuned = two(inputs)
    expected = outputs(tuned)
    compiled = torch.compile(tuned, backend="eager")
    assert close(compiled(given()), expected["a"])
    elsewhere: list[Tensor] = []
    with lora_fx.use(tuned, "b"):
        assert close(compiled(given()), expected["b"])
        thread = threading.Thread(target=lambda: elsewhere.append(compiled(given())))
        thread.start()
        thread.join()
        with lora_fx.disabled(tuned):
            assert close(compiled(given()), expected[None])
        assert close(compiled(given()), expected["b"])
    assert close(elsewhere[0], expected["a"])
    assert close(compiled(given()), expected["a"])
    lora_fx.use(tuned, {"a": 0.5, "b": 0.5})
    assert close(compiled(given()), tuned(given()))


def test_an_exported_program_computes_what_was_used_when_it_was_exported():
    tuned = two()
    expected = outputs(tuned)
    with lora_fx.use(tuned, "b"):
        program = torch.export.export(tuned, (given(),))
    assert close(program.module()(given()), expected["b"])


def test_a_replica_of_data_parallel_computes_with_what_was_used_when_it_was_made(monkeypatch):
    tuned = two()
    expected = outputs(tuned)
    sent = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setitem(replicate.__globals__, "_broadcast_coalesced_reshape", sent)
    with lora_fx.use(tuned, "b"):
        first, second = replicate(tuned, [0, 1])
    got: list[Tensor] = []
    thread = threading.Thread(target=lambda: got.append(second(given())))  # knows nothing of this thread's choices
    thread.start()
    thread.join()
    assert close(got[0], expected["b"])
    assert close(first(given()), expected["b"])
    assert close(tuned(given()), expected["a"])


def test_gradients_reach_a_model_through_its_replicas(monkeypatch):
    tuned = two()
    sent = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setitem(replicate.__globals__, "_broadcast_coalesced_reshape", sent)
    replicate(tuned, [0])[0](given()).square().sum().backward()
    through = {name: p.grad.clone() for name, p in tuned.named_parameters() if p.grad is not None}
    tuned.zero_grad()
    tuned(given()).square().sum().backward()
    assert through
    expected = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    assert through.keys() == expected.keys()
    assert all(torch.allclose(through[name], grad, atol=1e-5) for name, grad in expected.items())


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


def called(name: str) -> dict[str, object]:
    return {"version": 1, "rules": [{"match": {"name": "a"}, "lora": {"r": 2, "adapter": name, "init": "random"}}]}


@pytest.mark.parametrize("name", ["train", "training", "forward", "to", "T_destination"])
def test_a_graph_module_refuses_an_adapter_that_its_code_cannot_name_and_stays_as_it_is(name: str):
    base = fx.symbolic_trace(Plain())
    before = list(base.state_dict())
    with pytest.raises(
        lora_fx.RefusedError, match=rf'cannot name these adapters\n +{name} .*\n(.|\n)*backend="modules"'
    ):
        lora_fx.apply(base, called(name))
    assert list(base.state_dict()) == before


@pytest.mark.parametrize("name", ["train", "training", "forward", "to", "weight"])
def test_with_the_module_backend_adapters_of_a_graph_module_bear_any_name(name: str):
    torch.manual_seed(0)
    base, x = fx.symbolic_trace(Plain()), torch.randn(3, 4)
    tuned = lora_fx.apply(base, called(name), backend="modules")
    first, second = (tuned.state_dict()[f"a.lora_{factor}.{name}.weight"] for factor in "AB")
    assert close(tuned(x), base(x) + 8 * x @ first.t() @ second.t())
    tuned.train().eval()
    with lora_fx.use(tuned, None):
        assert torch.equal(tuned(x), base(x))


def test_checks_of_outputs_can_fail():
    tuned = two()
    found = outputs(tuned)
    assert not close(found["a"], found["b"])
    assert not close(found["a"], model()(given()))
