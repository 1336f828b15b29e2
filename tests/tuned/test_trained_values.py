"""Modules that are trained whole, biases and running statistics, when adapters are chosen: each thread sees its own."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.support.twoadapters import BACKENDS, Block, given

RULES = {
    "version": 1,
    "rules": [{"match": {"name": "**.{q,k}"}, "lora": {"r": 2, "bias": True, "init": "random"}}],
    "train": ["head", "norm", "memory"],
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.BatchNorm1d(6)
        self.free = nn.BatchNorm1d(6)
        self.memory = nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.memory(self.free(self.norm(x)).unsqueeze(0))[0])


def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


def trained(inputs: object = None) -> nn.Module:
    """Return an adapted model of which everything has moved that training moves."""
    torch.manual_seed(1)
    tuned = lora_fx.apply(model(), RULES, inputs, backend="auto" if inputs else "modules")
    step(tuned)
    return tuned


def step(tuned: nn.Module) -> None:
    tuned.train()
    tuned(given() * 3 + 1).square().sum().backward()
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            parameter -= 0.1 * parameter.grad.sign()
    tuned.zero_grad()
    tuned.eval()


@BACKENDS
def test_the_base_is_what_it_was_whatever_was_trained(inputs):
    tuned, expected = trained(inputs), model()(given())
    now = tuned(given())
    assert not torch.allclose(now, expected)
    with lora_fx.disabled(tuned):
        assert torch.equal(tuned(given()), expected)
    with lora_fx.use(tuned, None):
        assert torch.equal(tuned(given()), expected)
    assert torch.equal(tuned(given()), now)
    lora_fx.use(tuned, None)
    assert torch.equal(tuned(given()), expected)
    lora_fx.use(tuned, "default")
    assert torch.equal(tuned(given()), now)


@pytest.mark.parametrize("without", [lora_fx.disabled, lambda tuned: lora_fx.use(tuned, None)])
def test_other_threads_go_on_with_what_was_trained(without):
    tuned, base = trained(), model()(given())
    expected = tuned(given())
    seen: list[bool] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(torch.equal(tuned(given()), expected))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(100):
        with without(tuned):
            assert torch.equal(tuned(given()), base)
    stop.set()
    watcher.join()
    assert seen
    assert all(seen)


def test_what_is_used_in_part_is_between_the_base_and_what_was_trained():
    tuned = lora_fx.apply(model(), {**RULES, "train": ["head"]}, backend="modules")
    base = tuned.head.weight.detach().clone()
    step(tuned)
    value = tuned.head.weight.detach().clone()
    with lora_fx.use(tuned, {"default": 0.25}):
        assert torch.allclose(tuned.head.weight, base + 0.25 * (value - base))
        merged = lora_fx.merge(tuned)
        expected = tuned(given())
    assert torch.allclose(merged(given()), expected, atol=1e-5)


def test_what_was_trained_stays_with_an_adapter_that_is_renamed():
    tuned = trained()
    expected = tuned(given())
    lora_fx.rename(tuned, "default", "a")
    assert torch.equal(tuned(given()), expected)


def test_an_adapter_is_not_added_where_another_trains_the_weight():
    tuned = trained()
    rules = {"version": 1, "rules": [{"match": {"name": "head"}, "lora": {"r": 2}}]}
    with pytest.raises(lora_fx.RefusedError, match=r"another one trains whole\n.*head"):
        lora_fx.add(tuned, rules, adapter="b")
    assert len(lora_fx.list_adapters(tuned)) == 1


def test_statistics_are_not_mixed():
    tuned = trained()
    with pytest.raises(lora_fx.RefusedError, match=r"norm.running_mean.*values of buffers are not mixed"):
        lora_fx.use(tuned, {"default": 0.5})


def test_the_base_in_train_mode_moves_neither_the_callers_statistics_nor_the_adapted_models():
    caller = model()
    tuned = lora_fx.apply(caller, RULES, backend="modules")
    before = [buffer.clone() for buffer in (*caller.buffers(), *tuned.buffers())]
    tuned.train()
    with lora_fx.disabled(tuned):
        assert torch.equal(tuned(given()), copy.deepcopy(caller).train()(given()))
    assert all(map(torch.equal, before, (*caller.buffers(), *tuned.buffers())))


def test_keys_values_and_the_way_back_are_as_without_choices():
    tuned = trained()
    expected = tuned(given())
    assert [name for name in tuned.state_dict() if "lora" not in name] == list(model().state_dict())
    lora_fx.use(tuned, None)
    state = tuned.state_dict()
    assert not torch.equal(state["head.weight"], model().state_dict()["head.weight"])
    base = lora_fx.remove(tuned)
    assert torch.equal(base(given()), model()(given()))
    assert [type(part) for part in base.modules()] == [type(part) for part in model().modules()]
    lora_fx.use(tuned, "default")
    assert torch.allclose(lora_fx.merge(tuned)(given()), expected, atol=1e-5)


def test_copies_and_pickles_have_values_of_their_own():
    tuned = trained()
    twins = [copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))]
    expected = tuned(given())
    step(tuned)
    for twin in twins:
        assert torch.equal(twin(given()), expected)
        with lora_fx.disabled(twin):
            assert torch.equal(twin(given()), model()(given()))


def test_compiled_code_follows_what_is_used():
    torch.compiler.reset()
    tuned = trained()
    plain = lambda x: tuned.head(tuned.norm(tuned.blocks[0](x)))  # noqa: E731
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    expected = plain(given())
    assert torch.allclose(compiled(given()), expected, atol=1e-6)
    with lora_fx.use(tuned, {"default": 0.0}):
        base = plain(given())
        assert torch.allclose(compiled(given()), base, atol=1e-6)
    assert not torch.allclose(base, expected)
    assert torch.allclose(compiled(given()), expected, atol=1e-6)


def test_late_logits_have_the_bias_that_is_chosen():
    torch.manual_seed(0)
    caller = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 40))
    rules = {"version": 1, "rules": [{"match": {"name": "*"}, "lora": {"r": 2, "bias": True}}]}
    tuned = lora_fx.apply(caller, rules, (given(),), optimise=["loss"])
    with torch.no_grad():
        tuned[1].bias += 1
    labels = torch.arange(4)
    for name, expected in (("default", caller(given()) + 1), (None, caller(given()))):
        lora_fx.use(tuned, name)
        x = given().requires_grad_()
        loss = nn.functional.cross_entropy(tuned(x), labels)
        assert torch.allclose(loss, nn.functional.cross_entropy(expected, labels), atol=1e-5)
        loss.backward()
    with lora_fx.use(tuned, None):
        logits = tuned(given().requires_grad_())
    assert torch.allclose(logits + 0, caller(given()), atol=1e-5)  # read after the choice has ended
