"""Integers that a capture leaves open: a layer's number is general where it is an index, and a constant anywhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.capture.captured import Captured, capture, capture_open
from lora_fx.capture.reads.places import AttributePath
from lora_fx.regions import learning
from lora_fx.regions.install import regions
from lora_fx.regions.known import KNOWN
from lora_fx.regions.program import make_program
from tests.support import zoo
from tests.support.capturing import Block, x
from tests.support.peers import LLAMA, VOCABULARY, assert_same, tokens

PLACE = AttributePath("", ("layer_number",))
LAST = 3
Forward = Callable[[Any, Tensor, Any], Any]


class Cache:
    """Keeps a tensor for each layer."""

    def __init__(self) -> None:
        self.layers = [torch.full((8,), float(number)) for number in range(4)]
        self.by_number = {number: torch.ones(8) for number in range(5)}
        self.done = {2: True}
        self.pair = (torch.ones(8), torch.zeros(8), torch.ones(8))


def graph_of(forward: Forward, number: int = 0) -> tuple[Captured, nn.Module]:
    module = Block(forward, layer_number=number, own=["a", "b", "c", "d"], table={0: 1.0, 1: 2.0, 3: 2.0})
    with torch.no_grad():
        return capture(module, (x(), Cache()), {}, left_open=frozenset({PLACE})), module


def as_index(self: Any, x: Tensor, cache: Any) -> Tensor:
    if self.layer_number >= len(cache.layers) or self.layer_number is None:
        raise IndexError
    kept = cache.layers[self.layer_number]
    cache.layers[self.layer_number].add_(1)
    return self.first(x) + kept


def by_a_constant(self: Any, x: Tensor, cache: Any) -> Tensor:
    return (
        self.first(x)
        if self.layer_number > 2 or self.layer_number == 1
        else self.second(x) + cache.layers[self.layer_number]
    )


def test_number_that_is_an_index_is_open_and_the_graph_is_the_forward_for_each() -> None:
    graph, module = graph_of(as_index)
    assert graph.parameters == (PLACE,)
    assert PLACE not in graph.dependencies.read
    program = make_program(graph, module)
    for number in (0, 1, 3):
        module.layer_number = number
        mine, theirs = Cache(), Cache()
        inputs = program.guard.match_unproven(module, (x(), mine), {})
        assert isinstance(inputs, tuple)
        assert program.guard.match(module, (x(), mine), {}) == program.guard.reasons.index("value of layer_number", 1)
        with torch.no_grad():
            assert_same(program.function(module, *inputs), module(x(), theirs))
        assert_same(mine.layers, theirs.layers)
    for number in (4, -1, True):
        module.layer_number = number
        refused = program.guard.match_unproven(module, (x(), Cache()), {})
        assert isinstance(refused, int), number


def test_what_a_number_was_compared_with_is_guarded() -> None:
    graph, module = graph_of(by_a_constant)
    assert graph.parameters == (PLACE,)
    program = make_program(graph, module)
    cache = Cache()
    for number, fits in ((0, True), (1, False), (2, True), (3, False)):
        module.layer_number = number
        assert isinstance(program.guard.match_unproven(module, (x(), cache), {}), tuple) is fits, number


def by_key(self: Any, x: Tensor, cache: Any) -> Tensor:
    if cache.done.get(self.layer_number):
        return x + cache.by_number[self.layer_number]
    cache.done[self.layer_number] = True
    cache.by_number[self.layer_number] = cache.by_number[self.layer_number] + x.sum()
    cache.layers[self.layer_number] = x[0, 0]
    return self.first(x) + (cache.done[self.layer_number] and 4 not in cache.done)


def test_number_may_be_a_key_and_its_item_may_be_set() -> None:
    graph, module = graph_of(by_key)
    assert graph.parameters == (PLACE,)
    program = make_program(graph, module)
    for number, fits in ((0, True), (1, True), (2, False), (3, True), (4, False)):
        module.layer_number = number
        mine, theirs = Cache(), Cache()
        inputs = program.guard.match_unproven(module, (x(), mine), {})
        assert isinstance(inputs, tuple) is fits, (number, "2 is done")
        if isinstance(inputs, tuple):
            with torch.no_grad():
                assert_same(program.function(module, *inputs), module(x(), theirs))
            assert_same(list(mine.by_number.values()), list(theirs.by_number.values()))
            assert_same(mine.layers, theirs.layers)
            assert mine.done == theirs.done == {2: True, number: True}


def past_the_end(self: Any, x: Tensor, cache: Any) -> Tensor:
    try:
        return x + cache.layers[self.layer_number]
    except IndexError:
        return x


def two_numbers(self: Any, x: Tensor, cache: Any) -> Tensor:
    cache.layers[self.layer_number] = x[0, 0]
    return x + cache.layers[self.first_number]


def test_what_two_numbers_find_are_two_and_an_end_is_guarded() -> None:
    graph, module = graph_of(past_the_end, 5)
    assert graph.parameters == (PLACE,)
    program = make_program(graph, module)
    module.layer_number = 3
    assert isinstance(program.guard.match_unproven(module, (x(), Cache()), {}), int)
    module = Block(two_numbers, layer_number=1, first_number=0)
    with torch.no_grad():
        graph = capture(module, (x(), Cache()), {}, left_open=frozenset({PLACE, AttributePath("", ("first_number",))}))
    assert len(graph.parameters) == 2
    program = make_program(graph, module)
    assert isinstance(program.guard.match_unproven(module, (x(), Cache()), {}), tuple)
    module.first_number = 1
    assert isinstance(program.guard.match_unproven(module, (x(), Cache()), {}), int)


def swallowed(self: Any, x: Tensor, cache: Any) -> Tensor:
    try:
        return x * self.layer_number
    except:  # noqa: E722
        return x


def beside(self: Any, x: Tensor, cache: Any) -> Tensor:
    return x + cache.layers[self.layer_number] + cache.layers[0]


def beside_before(self: Any, x: Tensor, cache: Any) -> Tensor:
    return x + sum(layer for layer in cache.layers) + cache.layers[self.layer_number]


def put(self: Any, x: Tensor, cache: Any) -> Tensor:
    y = x + cache.layers[self.layer_number]
    cache.layers[0] = y
    return y


def of_another_class(self: Any, x: Tensor, cache: Any) -> Tensor:
    return x + 1 if type(self.layer_number) is int and self.layer_number > 2 else x + cache.layers[self.layer_number]


def asked_elsewhere(self: Any, x: Tensor, cache: Any) -> Tensor:
    return x + cache.layers[self.layer_number] if is_number({"number": (self.layer_number,)}) else x


def is_number(given: Any) -> bool:
    return any(type(value) is int for value in given["number"])


def kept(self: Any, x: Tensor, cache: Any) -> Tensor:
    cache.last = self.layer_number
    return x + cache.layers[self.layer_number]


OTHERWISE: dict[str, Forward] = {
    "a factor": lambda self, x, cache: x * (1 + self.layer_number),
    "a factor of a tensor": lambda self, x, cache: x * self.layer_number,
    "a torch function": lambda self, x, cache: x + torch.full((8,), self.layer_number),
    "a size": lambda self, x, cache: x + 1 if x.shape[1] > self.layer_number else x,
    "a float": lambda self, x, cache: x + 1 if self.layer_number < 0.5 else x,
    "a text": lambda self, x, cache: x + (f"{self.layer_number}" == "0"),
    "a key of its own dict": lambda self, x, cache: x + self.table[self.layer_number],
    "an item of its own list": lambda self, x, cache: x + (self.own[self.layer_number] == "a"),
    "an item of a tuple": lambda self, x, cache: x + cache.pair[self.layer_number],
    "a slice": lambda self, x, cache: x + len(cache.layers[self.layer_number :]),
    "a range": lambda self, x, cache: x + len(range(self.layer_number)),
    "a set": lambda self, x, cache: x + (self.layer_number in {0, 5}),
    "the same number": lambda self, x, cache: x + 1 if self.layer_number is LAST else x + cache.layers[self.layer_number],
    "a result": lambda self, x, cache: (x + 1, self.layer_number),
    "swallowed": swallowed, "beside": beside, "beside before": beside_before, "put": put, "kept": kept,
    "of another class": of_another_class, "asked elsewhere": asked_elsewhere,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_number_that_is_used_otherwise_is_the_constant_that_it_is_without(name: str) -> None:
    graph, module = graph_of(OTHERWISE[name])
    with torch.no_grad():
        plain = capture(module, (x(), Cache()), {})
    assert graph.parameters == ()
    assert graph.dependencies.read == plain.dependencies.read
    assert str(graph.graph) == str(plain.graph)


@pytest.mark.parametrize("forward", [beside, beside_before, put])
def test_items_that_are_found_otherwise_are_not_the_one_that_a_number_finds(forward: Forward) -> None:
    graph, module = graph_of(forward, 3)
    if forward is beside_before:
        assert graph.parameters == ()
        return
    program = make_program(graph, module)
    for number in range(4):
        module.layer_number = number
        fits = isinstance(program.guard.match_unproven(module, (x(), Cache()), {}), tuple)
        assert fits is (number != 0), number


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    seen: list[Captured] = []

    def noted(original: Callable[..., Captured]) -> Callable[..., Captured]:
        def called(module: nn.Module, *rest: Any) -> Captured:
            graph = original(module, *rest)
            if "Layer" in type(module).__name__ or isinstance(module, Numbered):
                seen.append(graph)
            return graph

        return called

    monkeypatch.setattr(learning, "capture", noted(capture))
    monkeypatch.setattr(learning, "capture_open", noted(capture_open))
    KNOWN.clear()
    return seen


def test_layers_of_a_decoder_are_captured_thrice_in_the_first_mode_and_once_in_others(captures: list[Captured]) -> None:
    base = LLAMA.build(num_hidden_layers=3, use_cache=True)
    ids = tokens(2, 9)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tuned = lora_fx.apply(base, zoo.rules(r=2), given)
    assert [len(graph.parameters) for graph in captures] == [0, 0, 1, 1, 1, 1], "the third time open"
    modules = lora_fx.apply(base, zoo.rules(r=2), backend="modules")
    for one in (tuned, modules):
        zoo.randomise_(one)
    runs = []
    for one in (tuned, modules):
        with torch.no_grad():
            steps = one.eval()(**given)
            more = one(input_ids=ids[:, :1] % VOCABULARY, past_key_values=steps.past_key_values)
        runs.append([steps.logits, more.logits, *(layer.keys for layer in more.past_key_values.layers)])
    torch.testing.assert_close(runs[0], runs[1])
    hits = [region.hits for _, _, region in regions(tuned) if region.path.endswith(("0", "1", "2"))]
    assert min(hits) >= 1


class Numbered(nn.Module):
    """Clamps in training, from its second layer on: the samples show none of it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number, self.linear = number, nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        y = self.linear(x) + cache.layers[self.layer_number]
        return y.clamp(-50, 50) if self.training and self.layer_number > 0 else y


class Numbers(nn.Module):
    def __init__(self, count: int = 3, kind: type[Numbered] = Numbered) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind(number) for number in range(count))

    def forward(self, x: Tensor) -> Tensor:
        cache = Cache()
        for block in self.blocks:
            x = block(x, cache) + cache.layers[0]
        return x


def test_way_that_only_other_layers_go_in_training_is_not_lost(captures: list[Captured]) -> None:
    torch.manual_seed(0)
    base = Numbers()
    x = torch.randn(2, 5, 8)
    tuned = lora_fx.apply(base, zoo.rules(r=2), (x,)).train()
    assert [len(graph.parameters) for graph in captures] == [0, 0, 1, 1, 1], "of the first block, and of those after it"
    assert_same(tuned(1e4 * x), base.train()(1e4 * x))


class Late(Numbered):
    """Clamps from its third layer on: the first two, of which a graph for all is made, do not."""

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        y = self.linear(x) + cache.layers[self.layer_number]
        return y.clamp(-50, 50) if self.layer_number > 1 else y


def test_way_that_neither_of_the_first_two_layers_goes_is_not_lost() -> None:
    torch.manual_seed(0)
    base = Numbers(4, Late)
    x = torch.randn(2, 5, 8)
    tuned = lora_fx.apply(base, zoo.rules(r=2), (x,))
    assert_same(tuned(1e4 * x), base(1e4 * x))
    hits = {region.path: region.hits for _, _, region in regions(tuned)}
    assert hits == {f"blocks.{number}": 1 for number in range(4)}
    graphs = {id(graph): graph for _, _, region in regions(tuned) for graph in region.block.programs}
    assert len(graphs) == 2, "of the first two, and of those after them"
    assert all(graph.captured.parameters == (PLACE,) for graph in graphs.values())
