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


def trained(inputs: object = None, moves_free: bool = True) -> nn.Module:
    """Return an adapted model of which everything has moved that training moves."""
    torch.manual_seed(1)
    tuned = lora_fx.apply(model(), RULES, inputs, backend="auto" if inputs else "modules")
    step(tuned, moves_free)
    return tuned


def step(tuned: nn.Module, moves_free: bool = True) -> None:
    tuned.train()
    tuned.free.train(moves_free)
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


OTHER = {
    "version": 1,
    "rules": [{"match": {"name": "**.{k,out}"}, "lora": {"r": 3, "bias": True, "init": "random"}}],
    "train": ["head", "norm", "memory"],
}


def two(inputs: object = None) -> tuple[nn.Module, dict[str | None, Tensor]]:
    """Return a model with two trained adapters, and what each gives alone."""
    torch.manual_seed(2)
    other = lora_fx.apply(model(), OTHER, backend="modules")
    step(other, moves_free=False)
    with torch.no_grad():
        other.head.bias += 1
    tuned = trained(inputs, moves_free=False)
    expected = {"default": tuned(given()), "b": other(given()), None: model()(given())}
    lora_fx.add(tuned, other, adapter="b")
    return tuned, expected


@BACKENDS
def test_each_adapter_has_modules_and_biases_of_its_own(inputs):
    tuned, expected = two(inputs)
    for name in ("default", "b", None, "b", "default"):
        lora_fx.use(tuned, name)
        assert torch.equal(tuned(given()), expected[name]), name


def test_base_keys_stay_and_what_was_added_has_keys_of_its_own():
    tuned, _ = two()
    names = list(tuned.state_dict())
    assert [name for name in names if "lora" not in name] == list(model().state_dict())
    assert "head.lora_trained.b.weight" in names
    assert "blocks.0.k.lora_trained.b.bias" in names


def test_training_one_adapter_moves_nothing_of_the_other():
    tuned, _ = two()
    lora_fx.use(tuned, "b")
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    trained_now = set()
    tuned.train()
    tuned(given()).square().sum().backward()
    for name, parameter in tuned.named_parameters():
        if parameter.grad is not None:
            trained_now.add(name)
    tuned.eval()
    assert trained_now
    assert all(".b." in name for name in trained_now)
    moved = {name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in moved if not name.startswith("free.")} == {
        f"norm.lora_trained.b.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert {id(p) for p in lora_fx.parameters(tuned)} >= {
        id(p) for name, p in tuned.named_parameters() if name in trained_now
    }


def test_an_added_adapter_can_be_frozen_renamed_and_dropped_with_all_it_has():
    tuned, expected = two()
    lora_fx.rename(tuned, "b", "c")
    lora_fx.use(tuned, "c")
    assert torch.equal(tuned(given()), expected["b"])
    lora_fx.use(tuned, "default")
    lora_fx.drop(tuned, "c")
    assert torch.equal(tuned(given()), expected["default"])
    assert not any(".c." in name for name in tuned.state_dict())
    lora_fx.add(tuned, OTHER, adapter="d", trainable=False)
    assert not any(p.requires_grad for name, p in tuned.named_parameters() if ".d." in name)


def test_what_is_used_is_merged_and_the_base_comes_back():
    tuned, expected = two()
    lora_fx.use(tuned, "b")
    merged, base = lora_fx.merge(tuned), lora_fx.remove(tuned)
    assert torch.allclose(merged(given()), expected["b"], atol=1e-5)
    assert torch.equal(base(given()), expected[None])
    for plain in (merged, base):
        assert list(plain.state_dict()) == list(model().state_dict())
        assert [type(part) for part in plain.modules()] == [type(part) for part in model().modules()]


def test_a_checkpoint_has_all_that_an_added_adapter_trains():
    tuned, expected = two()
    state = {name: tensor.clone() for name, tensor in lora_fx.adapter_state(tuned).items()}
    assert {"head.lora_trained.b.weight", "norm.lora_trained.b.running_mean", "blocks.0.k.lora_trained.b.bias"} <= set(
        state
    )
    fresh = lora_fx.apply(model(), RULES, backend="modules")
    lora_fx.add(fresh, OTHER, adapter="b")
    lora_fx.load_adapter_state(fresh, state)
    lora_fx.use(fresh, "b")
    assert torch.equal(fresh(given()), expected["b"])


def test_files_of_an_added_adapter_have_its_own_modules(tmp_path):
    tuned, expected = two()
    lora_fx.save(tuned, tmp_path)
    both = lora_fx.load(model(), tmp_path)
    for name in ("default", "b", None):
        lora_fx.use(both, name)
        assert torch.equal(both(given()), expected[name])
    lora_fx.save(tuned, tmp_path / "again", adapter="b")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
        tmp_path / "b/adapter_model.safetensors"
    ).read_bytes()
    alone = lora_fx.load(model(), tmp_path / "b")
    assert torch.allclose(alone(given()), expected["b"], atol=1e-6)


def test_copies_and_pickles_have_both():
    tuned, expected = two()
    for twin in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        for name in ("b", None, "default"):
            lora_fx.use(twin, name)
            assert torch.equal(twin(given()), expected[name])


def test_an_added_adapter_does_not_train_a_module_in_which_another_has_sites():
    tuned = trained()
    with pytest.raises(lora_fx.RefusedError, match=r"another one trains whole\n.*blocks.0.q"):
        lora_fx.add(tuned, {**OTHER, "rules": OTHER["rules"][:1], "train": ["blocks.0"]}, adapter="b")
