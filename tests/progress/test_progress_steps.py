"""Whoever makes a call hears how far it is, from any depth; nobody pays who does not listen."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.progress.steps import block_called, left_out, running, step

RULES = {"rules": [{"name": "mlp", "match": {"name": "*.{up,down}"}, "lora": {"r": 2}}]}


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Cube(Block):
    """Another kind of block, with a graph of its own."""

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)) ** 3)


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), Cube(), Cube())


def full(tuned: nn.Module) -> nn.Module:
    """Return the model as after full fine-tuning."""
    other = model()
    with torch.no_grad():
        other[0].up.weight.add_(0.1)
    return other


CALLS = {
    "plan": lambda told, tmp: lora_fx.plan(model(), RULES, (X,), progress=told),
    "explain": lambda told, tmp: lora_fx.explain(model(), "0.up", RULES, (X,), progress=told),
    "apply": lambda told, tmp: lora_fx.apply(model(), RULES, (X,), progress=told),
    "apply without inputs": lambda told, tmp: lora_fx.apply(model(), RULES, progress=told),
    "apply a plan": lambda told, tmp: lora_fx.apply(base := model(), lora_fx.plan(base, RULES, (X,)), progress=told),
    "load": lambda told, tmp: lora_fx.load(model(), tmp, (X,), progress=told),
    "diff": lambda told, tmp: lora_fx.diff(model(), full(model()), (X,), progress=told),
    "merge": lambda told, tmp: lora_fx.merge(lora_fx.apply(model(), RULES), progress=told),
    "export": lambda told, tmp: lora_fx.export(
        lora_fx.apply(model(), RULES), tmp / "out.safetensors", "merged", progress=told
    ),
    "extract": lambda told, tmp: lora_fx.extract(full(model()), model(), 2, progress=told),
}
NAMED = {
    "plan": "capturing 0, 0 of 8 calls of blocks",
    "explain": "comparing at other sizes, ",
    "apply": "adapting 0.up, 1 of 8 sites",
    "apply without inputs": "tracing 3",
    "apply a plan": "proving ",
    "load": "filling ",
    "diff": "learning sizes",
    "merge": "merging, 8 of 8 layers",
    "export": "writing",
    "extract": "decomposing 0.up, 1 of 1 differences",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_hears_all_of_a_call_never_backwards_to_its_end(name, tmp_path):
    lora_fx.save(lora_fx.apply(model(), RULES), tmp_path)
    told: list[tuple[int, int, str]] = []
    CALLS[name](lambda *event: told.append(event), tmp_path)
    done, totals, names = zip(*told)
    assert list(done) == sorted(done)
    assert set(totals) == {1000}
    assert done[0] < 500
    assert done[-1] == 1000
    assert all(one != other for one, other in itertools.pairwise(told))
    assert any(NAMED[name] in what for what in names), names
    for what in names:
        counted, _, of = what.rpartition(", ")[2].partition(" of ")
        assert not of or int(counted) <= int(of.split()[0])


def test_counts_of_a_step_never_fall():
    told: list[str] = []
    lora_fx.apply(model(), RULES, (X,), progress=lambda done, total, what: told.append(what))
    steps: dict[str, list[int]] = {}
    for name, count in re.findall(r"^(.*?)(?: \d\S*)?, (\d+) of", "\n".join(told), re.MULTILINE):
        steps.setdefault(name, []).append(int(count))
    assert {"capturing", "proving", "proving at other sizes", "adapting"} <= set(steps)
    assert all(counts == sorted(counts) for counts in steps.values()), steps


def test_adapted_model_is_the_same_bit_by_bit_whoever_listens():
    made = []
    for listener in (False, lambda *event: None):
        torch.manual_seed(0)
        tuned = lora_fx.apply(model(), RULES, (X,), progress=listener)
        made.append((tuned, torch.rand(())))
    (alone, next_number), (watched, next_of_watched) = made
    assert torch.equal(next_number, next_of_watched)
    regions, regions_of_watched = (
        [(region.path, region.graphs, region.guards, region.misses) for region in lora_fx.inspect(tuned).regions]
        for tuned, _ in made
    )
    assert regions == regions_of_watched
    assert all(map(torch.equal, watched.state_dict().values(), alone.state_dict().values()))
    for tuned, _ in made:
        torch.manual_seed(0)
        for parameter in lora_fx.parameters(tuned):
            nn.init.normal_(parameter)
    assert torch.equal(alone(X), watched(X))
    assert not lora_fx.diff(alone, watched)


def test_calls_in_two_threads_are_told_apart():
    heard: dict[str, list[str]] = {"a": [], "b": []}
    barrier = threading.Barrier(2)

    def call(name: str) -> None:
        with running(name, lambda done, total, what: heard[name].append(what)):
            for number in range(3):
                barrier.wait()
                with step(f"{name}{number}"):
                    barrier.wait()

    threads = [threading.Thread(target=call, args=(name,)) for name in heard]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: list(dict.fromkeys(names)) for name, names in heard.items()} == {
        "a": ["a0", "a1", "a2"],
        "b": ["b0", "b1", "b2"],
    }


def test_two_models_are_adapted_at_once_and_each_tells_its_own():
    heard: dict[int, list[int]] = {1: [], 2: []}

    def call(blocks: int) -> None:
        layers = nn.Sequential(*(Block() for _ in range(blocks)))
        lora_fx.apply(layers, RULES, backend="modules", progress=lambda done, total, what: heard[blocks].append(what))

    threads = [threading.Thread(target=call, args=(blocks,)) for blocks in heard]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for blocks, names in heard.items():
        assert {what.split(" of ")[1] for what in names if what.startswith("adapting")} == {f"{2 * blocks} sites"}


def test_an_error_ends_the_telling_and_nothing_is_left():
    told: list[tuple[int, int, str]] = []
    with pytest.raises(lora_fx.NoMatchError):
        lora_fx.apply(model(), {"rules": [{"match": {"name": "none"}}]}, (X,), progress=lambda *e: told.append(e))
    assert all(done < total for done, total, _ in told)
    assert step("after") is step("after"), "nobody listens any more"


@pytest.mark.parametrize("at", ["watching", "learning", "capturing", "comparing", "adapting", "proving"])
def test_what_a_listener_raises_ends_the_call_wherever_it_is(at):
    class Enough(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if what.startswith(at):
            raise Enough(what)

    with pytest.raises(Enough):
        lora_fx.apply(model(), RULES, (X,), progress=stop)
    assert step() is step()


def test_a_call_inside_of_another_is_a_step_of_it():
    told: list[tuple[int, int, str]] = []
    with running("outer", lambda *event: told.append(event), 2):
        lora_fx.merge(lora_fx.apply(model(), RULES, backend="modules"))
    assert any("adapting" in what for _, _, what in told)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    told.clear()
    with running("outer", lambda *event: told.append(event)), running("inner", False), step("unheard"):
        block_called(3, "unheard")
    assert not any("unheard" in what for _, _, what in told)


def test_steps_without_a_known_number_come_nearer_to_the_end_and_not_past_it():
    shares: list[int] = []
    with running("call", lambda done, total, what: shares.append(done), 2):
        with step("search", None) as doing:
            for _ in range(5):
                doing.advance()
        assert shares == [0, 450, 495, 499, 500]
        with step("rest", 3, "things") as doing:
            doing.reach(2)
            doing.reach(1)
            doing.reach(9)
    assert shares[5:] == [500, 833, 1000]


def test_what_is_left_out_leaves_its_share_to_the_rest():
    shares: list[int] = []
    with running("call", lambda done, total, what: shares.append(done), 10):
        left_out(8)
        with step("one"):
            pass
        with step("two"):
            pass
    assert shares == [0, 500, 500, 1000]


def test_nothing_is_made_where_nobody_listens():
    threads = threading.active_count()
    with running("call", None):  # pytest's standard error is no terminal
        assert step("one", 3) is step("other", None)
        assert threading.active_count() == threads
    with running("call", False):
        assert step("one", 3) is step("other", None)


@pytest.mark.parametrize("wrong", ["yes", 1.0, 3])
def test_what_cannot_be_told_is_an_error_before_anything_is_done(wrong):
    with pytest.raises(ValueError, match="must be None, True, False"):
        lora_fx.plan(model(), RULES, progress=wrong)


_SCRIPT = """
import sys, torch, lora_fx
import lora_fx.progress.terminal as terminal
terminal.PATIENCE = 0.0
layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
progress = {"None": None, "True": True, "False": False}[sys.argv[1]]
tuned = lora_fx.apply(layers, {"rules": [{"match": {"name": "*"}, "lora": {"r": 1}}]}, (torch.ones(2, 4),), progress=progress)
lora_fx.merge(tuned, progress=progress)
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("progress", "most"), [("None", 0), ("True", 8), ("False", 0)])
def test_a_pipe_gets_nothing_unasked_and_few_plain_lines_when_asked(progress, most):
    ended = subprocess.run([sys.executable, "-c", _SCRIPT, progress], capture_output=True, text=True, check=True)
    assert ended.stdout == "done\n"
    lines = ended.stderr.splitlines()
    assert len(lines) <= most
    assert bool(lines) == bool(most)
    assert "\r" not in ended.stderr
    assert all(line.isprintable() and line.startswith(("apply: ", "merge: ")) for line in lines)
    assert not lines or " · 100 % · " in lines[-1]
