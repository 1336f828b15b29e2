"""Weights that something else ties, reads, or writes to: right on the twin, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from tests.support.around import assert_close, filled

ALL = {"version": 1, "rules": [{"match": {"name": "**", "op": "linear"}, "lora": {"r": 2, "alpha": 4}}]}


class Head(nn.Module):
    """A head that one path calls and another reads, as chunked losses do."""

    def __init__(self, reads: str = "asked") -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 6, bias=False)
        self.reads = reads

    def forward(self, x: Tensor, read: bool = False) -> Tensor:
        h = torch.tanh(self.body(x))
        if read or (self.reads == "in training" and self.training):
            return F.linear(h, self.head.weight)
        return self.head(h)


def head(reads: str = "asked") -> Head:
    torch.manual_seed(0)
    return Head(reads).eval()


def rows() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


CALLED, READ = lora_fx.call(rows()), lora_fx.call(rows(), read=True)
EXAMPLES = {
    "called, then read": [CALLED, READ],
    "read, then called": [READ, CALLED],
    "called": [CALLED],
    "read": [READ],
    "none": None,
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", ["auto", "modules"])
@pytest.mark.parametrize("examples", EXAMPLES.values(), ids=EXAMPLES)
def test_weight_is_adapted_whether_it_is_called_or_read(examples, backend, training):
    tuned = filled(lora_fx.apply(head(), ALL, examples, backend=backend)).train(training)
    merged = lora_fx.merge(tuned)
    for read in (False, True, False):
        assert_close(tuned(rows(), read=read), merged(rows(), read=read))
        tuned.zero_grad()
        tuned(rows(), read=read).sum().backward()
        assert all(parameter.grad is not None for parameter in lora_fx.parameters(tuned))


def test_weight_that_is_read_in_training_alone_is_adapted_there():
    tuned = filled(lora_fx.apply(head("in training"), ALL, (rows(),)))
    merged = lora_fx.merge(tuned)
    for training in (True, False, True):
        assert_close(tuned.train(training)(rows()), merged.train(training)(rows()))


def test_code_outside_of_the_model_reads_the_adapted_weight():
    tuned = filled(lora_fx.apply(head(), ALL, (rows(),)))
    hidden = torch.randn(3, 8)
    loss = F.linear(hidden, tuned.head.weight).sum()
    assert_close(loss, tuned.head(hidden).sum())
    loss.backward()
    read = [adapter.grad.clone() for adapter in tuned.head.lora_B.parameters()]
    tuned.zero_grad()
    tuned.head(hidden).sum().backward()
    for one, other in zip(read, tuned.head.lora_B.parameters(), strict=True):
        assert_close(one, other.grad)


class ChunkedLoss(torch.autograd.Function):
    """As fused losses do it: the product is made inside, with a gradient for the weight as a whole."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        ctx.rows = weight.shape[0]
        ctx.wanted = weight.requires_grad
        return (x @ weight.t()).sum()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        assert ctx.wanted, "the weight that is shown asks for its gradient"
        whole = gradient * torch.ones(x.shape[0], ctx.rows).t() @ x
        return None, whole


def test_gradient_of_a_fused_loss_reaches_the_factors():
    tuned, hidden = filled(lora_fx.apply(head(), ALL, (rows(),))), torch.randn(3, 8)
    ChunkedLoss.apply(hidden, tuned.head.weight).backward()
    fused = [parameter.grad.clone() for parameter in lora_fx.parameters(tuned) if parameter.grad is not None]
    tuned.zero_grad()
    tuned.head(hidden).sum().backward()
    plain = [parameter.grad for parameter in lora_fx.parameters(tuned) if parameter.grad is not None]
    assert len(fused) == len(plain) == 2
    for one, other in zip(fused, plain, strict=True):
        assert_close(one, other)


def test_asking_a_weight_for_its_dtype_keeps_nothing_for_the_backward():
    tuned = filled(lora_fx.apply(head(), ALL, (rows(),)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        assert tuned.head.weight.dtype == torch.float32
    assert not kept


def test_read_weight_is_not_differentiated_with_factors_that_changed_since():
    tuned = filled(lora_fx.apply(head(), ALL, (rows(),)))
    loss = ChunkedLoss.apply(torch.randn(3, 8), tuned.head.weight)
    for factor in lora_fx.parameters(tuned):
        with torch.no_grad():
            factor.mul_(2)
    with pytest.raises(RuntimeError, match="LoRA factors were changed in place"):
        loss.backward()


def test_parameter_itself_is_what_get_parameter_gives_and_what_writes_reach():
    tuned = lora_fx.apply(head(), ALL, (rows(),))
    parameter = tuned.get_parameter("head.weight")
    assert isinstance(parameter, nn.Parameter)
    tuned.head.weight.requires_grad_(True)
    assert parameter.requires_grad
    tuned.head.weight.requires_grad = False
    assert not parameter.requires_grad
    with torch.no_grad():
        tuned.head.weight.fill_(2.0)
    assert (parameter == 2.0).all()
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([tuned.head.weight], lr=0.1)
    with pytest.raises(TypeError, match="cannot assign"):
        tuned.body.weight = tuned.head.weight


class WritesToItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            with torch.no_grad():
                self.linear.weight.div_(2.0)
        return self.linear(x)


def test_forward_that_writes_to_parameters_is_refused_before_it_does():
    model = WritesToItself().eval()
    before = model.linear.weight.detach().clone()
    with pytest.raises(lora_fx.RefusedError, match=r"linear.weight +div_ in place"):
        lora_fx.plan(model, ALL, (rows(),))
    assert torch.equal(model.linear.weight, before)


def test_embedding_scales_its_gradient_by_frequency_as_the_base_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, scale_grad_by_freq=True), nn.Linear(4, 2))
    rules = {"version": 1, "rules": [{"match": {"name": "0"}, "lora": {"r": 2}}]}
    tuned, ids = filled(lora_fx.apply(model, rules)), torch.tensor([[1, 1, 1, 2]])
    tuned(ids).sum().backward()
    gradient = tuned[0].lora_A["default"].weight.grad
    assert_close(gradient[:, 1], gradient[:, 2])


# -- ties


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(ids))))


IDS = torch.tensor([[1, 3, 5]])


def tied(train: list[str]) -> tuple[Tied, nn.Module]:
    torch.manual_seed(0)
    model = Tied().eval()
    rules = {"version": 1, "rules": [{"match": {"name": "body"}, "lora": {"r": 2}}], "train": train}
    return model, filled(lora_fx.apply(model, rules, (IDS,)))


@pytest.mark.parametrize("train", [["embedding", "head"], ["head"], ["embedding"]], ids=str)
def test_tied_ends_are_saved_loaded_merged_and_removed(train, tmp_path):
    model, tuned = tied(train)
    expected = tuned(IDS)
    assert (tuned.embedding.weight is tuned.head.weight) == (len(train) == 2)
    lora_fx.save(tuned, tmp_path)
    assert_close(lora_fx.load(model, tmp_path)(IDS), expected)
    assert_close(lora_fx.merge(tuned)(IDS), expected)
    base = lora_fx.remove(tuned)
    assert torch.equal(base(IDS), model(IDS))
    assert base.embedding.weight is base.head.weight, "tied again"


def test_ends_that_a_file_has_apart_are_apart(tmp_path):
    model, tuned = tied(["embedding", "head"])
    tuned.head.weight = nn.Parameter(tuned.head.weight.detach() * 2)
    lora_fx.save(tuned, tmp_path)
    loaded = lora_fx.load(model, tmp_path)
    assert_close(loaded(IDS), tuned(IDS))
    assert loaded.head.weight is not loaded.embedding.weight
    removed = lora_fx.remove(loaded)
    assert removed.head.weight is removed.embedding.weight


# -- every tie and every read, at a leaf, a block and the root


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[1](self.blocks[0](x)))


class ReadingLeaf(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)


class ReadingBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(torch.tanh(self.first(x)), self.first.weight, self.second.bias)


class ReadingRoot(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(super().forward(x), self.blocks[0].first.weight)


def within_a_block(model: Blocks) -> None:
    model.blocks[0].second.weight = model.blocks[0].first.weight


def between_blocks(model: Blocks) -> None:
    model.blocks[1].first.weight = model.blocks[0].first.weight


def with_the_head(model: Blocks) -> None:
    model.head.weight = model.blocks[0].first.weight


def by_a_bias(model: Blocks) -> None:
    model.head.bias = model.blocks[0].first.bias


def by_a_layer(model: Blocks) -> None:
    model.blocks[1].first = model.blocks[0].first


def by_a_block(model: Blocks) -> None:
    model.blocks[1] = model.blocks[0]


def read_by_itself(model: Blocks) -> None:
    model.blocks[0].first.__class__ = ReadingLeaf


def read_by_its_block(model: Blocks) -> None:
    model.blocks[0].__class__ = ReadingBlock


def read_by_the_root(model: Blocks) -> None:
    model.__class__ = ReadingRoot


SITUATIONS = (
    within_a_block, between_blocks, with_the_head, by_a_bias, by_a_layer, by_a_block,
    read_by_itself, read_by_its_block, read_by_the_root,
)  # fmt: skip
SOME = {"version": 1, "rules": [{"match": {"name": "**.first"}, "lora": {"r": 2, "bias": True}}], "train": ["head"]}


@pytest.mark.parametrize("given", [(rows(),), None], ids=["inputs", "no inputs"])
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda kind: kind.__name__)
def test_twin_is_one_model_whatever_is_tied_or_read(situation: Callable[[Blocks], None], given, tmp_path):
    def model() -> Blocks:
        torch.manual_seed(0)
        made = Blocks().eval()
        situation(made)
        return made

    base, x = model(), rows()
    tuned = filled(lora_fx.apply(base, SOME, given))
    expected, merged = tuned(x).detach(), lora_fx.merge(tuned)
    assert not torch.allclose(expected, base(x), atol=1e-2), "the adapters have an effect"
    assert_close(merged(x), expected)
    assert_close(tuned.train()(x), expected)
    inputs = [rows().requires_grad_() for _ in range(2)]
    for network, given_x in zip((tuned.eval(), merged), inputs, strict=True):
        network(given_x).square().sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad)
    assert all(parameter.grad is not None for parameter in lora_fx.parameters(tuned))
    with lora_fx.disabled(tuned):
        assert torch.equal(tuned(x), base(x))
    removed = lora_fx.remove(tuned)
    assert torch.equal(removed(x), base(x))
    assert [name for name, _ in removed.named_parameters()] == [name for name, _ in base.named_parameters()]
    lora_fx.save(tuned, tmp_path)
    assert_close(lora_fx.load(model(), tmp_path, given)(x), expected)
    copied = copy.deepcopy(tuned)
    with torch.no_grad():
        for parameter in lora_fx.parameters(copied):
            parameter.add_(1)
    assert_close(tuned(x), expected)
    assert_close(lora_fx.merge(copied)(x), copied(x))
