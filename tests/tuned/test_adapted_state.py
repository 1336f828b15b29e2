"""Copies, pickles, state dicts, dtypes, replaced parts, threads: an adapted real model stays right through all of them."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.models.swap import Swapped, original_class, swap
from tests.support import zoo
from tests.support.peers import (
    BERT,
    DIT,
    LARGE,
    LLAMA,
    QUICK,
    T5,
    VIT,
    Peer,
    adapted,
    assert_close,
    assert_same,
    counts,
    each,
    gradients,
    pair,
    tokens,
)

ROOT = Path(__file__).parents[2]


def values(tuned: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in tuned.parameters()]


def step(peer: Peer, tuned: nn.Module) -> None:
    """Train the adapters a little."""
    optimizer = torch.optim.SGD(lora_fx.parameters(tuned), lr=1.0)
    gradients(tuned, peer.call(tuned))
    optimizer.step()


# -- copies


@each(QUICK, slow=LARGE)
def test_training_a_copy_leaves_the_original_alone_and_the_other_way_round(peer: Peer):
    original = adapted(peer)
    duplicate = copy.deepcopy(original)
    with torch.no_grad():
        before = peer.call(original)
        assert_same(peer.call(duplicate), before)
    step(peer, duplicate)
    with torch.no_grad():
        assert_same(peer.call(original), before)
        moved = peer.call(duplicate)
        assert not torch.equal(moved, before)
    step(peer, original)
    with torch.no_grad():
        assert_same(peer.call(duplicate), moved)
        assert_same(peer.call(original), moved), "the same step from the same values"


def test_hooks_and_replaced_parts_of_a_copy_are_its_own():
    original = adapted(BERT)
    duplicate = copy.deepcopy(original)
    before = BERT.call(original)
    seen: list[int] = []
    duplicate.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: seen.append(1))
    duplicate.bert.encoder.layer[1].output.dense = nn.Linear(48, 32)
    assert_same(BERT.call(original), before)
    assert not seen
    assert not torch.equal(BERT.call(duplicate), before)
    assert seen == [1]


def test_copy_merges_removes_and_saves_as_its_original_does(tmp_path):
    original = adapted(LLAMA)
    duplicate = copy.deepcopy(original)
    with torch.no_grad():
        assert_same(LLAMA.call(lora_fx.merge(duplicate)), LLAMA.call(lora_fx.merge(original)))
        assert_same(LLAMA.call(lora_fx.remove(duplicate)), LLAMA.call(LLAMA.build().requires_grad_(False)))
    lora_fx.save(original, tmp_path / "original")
    lora_fx.save(duplicate, tmp_path / "duplicate")
    for file in (tmp_path / "original").iterdir():
        assert file.read_bytes() == (tmp_path / "duplicate" / file.name).read_bytes()


READER = """
import pickle, sys, torch
from pathlib import Path
torch.set_num_threads(1)
loaded = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    loaded[folder.name, "pickle"] = pickle.loads((folder / "pickle").read_bytes())
    loaded[folder.name, "torch"] = torch.load(folder / "torch", weights_only=False)
import lora_fx
for (name, kind), tuned in loaded.items():
    given, expected = torch.load(Path(sys.argv[1], name, "expected"))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(tuned(**given)[0], expected), (name, kind)
    report = lora_fx.inspect(tuned)
    assert all(region.graphs and region.hits for region in report.regions), report
    tuned(**given)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in lora_fx.parameters(tuned))
    assert lora_fx.merge(tuned)(**given)[0].shape == expected.shape
    print(name, kind, type(tuned).__name__, len(report.sites))
"""


@pytest.mark.parametrize(
    "peers", [(LLAMA, VIT), pytest.param((BERT, DIT, *LARGE), marks=pytest.mark.slow)], ids=["quick", "large"]
)
def test_pickled_and_saved_models_work_in_a_fresh_process_and_capture_there_anew(peers: tuple[Peer, ...], tmp_path):
    lines = []
    for peer in sorted(peers, key=lambda peer: peer.name):
        tuned, given, folder = adapted(peer), peer.inputs(3, 7), tmp_path / peer.name
        folder.mkdir()
        with torch.no_grad():
            expected = tuned(**given)[0]
        (folder / "pickle").write_bytes(pickle.dumps(tuned))
        torch.save(tuned, folder / "torch")
        torch.save((given, expected), folder / "expected")
        sites = len(lora_fx.inspect(tuned).sites)
        lines += [f"{peer.name} {kind} {type(tuned).__name__} {sites}" for kind in ("pickle", "torch")]
    command = [sys.executable, "-c", READER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == lines


# -- state dicts


@each(QUICK, slow=LARGE)
@pytest.mark.parametrize("assign", [False, True])
def test_strictly_loaded_state_is_used(peer: Peer, assign: bool):
    tuned, other = adapted(peer, random=False), adapted(peer)
    result = tuned.load_state_dict(other.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    with torch.no_grad():
        assert_same(peer.call(tuned), peer.call(other))
    assert counts(tuned)[1] == 0


def test_base_state_dict_fits_into_an_adapted_model_but_for_the_adapter():
    base, tuned = LLAMA.build(), adapted(LLAMA)
    result = tuned.load_state_dict(base.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(".lora_A.default.weight" in key or ".lora_B.default.weight" in key for key in result.missing_keys)


# -- dtypes


@each(QUICK, slow=LARGE)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.sampled(2)
def test_cast_model_gives_what_the_cast_module_backend_gives(peer: Peer, dtype: torch.dtype):
    results = []
    for model in pair(peer):
        with torch.no_grad():
            results.append([peer.call(model.to(dtype), *shape, dtype=dtype) for shape in ((3, 7), (2, 4))])
    assert results[0][0].dtype == dtype
    assert_close(*results)
    graph = adapted(peer).to(dtype)
    assert {p.dtype for p in lora_fx.parameters(graph)} == {dtype}


@each((BERT, LLAMA))
def test_model_cast_there_and_back_hits_its_first_graphs_again(peer: Peer):
    tuned = adapted(peer)
    with torch.no_grad():
        for dtype in (torch.float64, torch.float32):
            peer.call(tuned.to(dtype), dtype=dtype)
        before = counts(tuned)
        peer.call(tuned)
    assert counts(tuned)[1] == before[1]


@each(QUICK, slow=LARGE)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.sampled(2)
def test_autocast_gives_what_it_gives_in_the_module_backend(peer: Peer, training: bool):
    results = []
    for model in pair(peer):
        model.train(training)
        outputs = []
        for _ in range(2):
            torch.manual_seed(7)
            with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=torch.bfloat16):
                result = peer.call(model)
            outputs.append([result, *(gradients(model, result) if training else ())])
        results.append(outputs)
    for ours, theirs in zip(*results, strict=True):
        assert ours[0].dtype == theirs[0].dtype
        assert_autocast_close(ours, theirs)


def assert_autocast_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Compare as bfloat16, in which the products were rounded."""
    assert_close([t.bfloat16() for t in ours], [t.bfloat16() for t in theirs])


def test_autocast_check_fails_where_it_should():
    with pytest.raises(AssertionError):
        assert_autocast_close([torch.ones(2)], [torch.full((2,), 1.1)])


# -- parts replaced and settings changed afterwards


@each(QUICK, slow=LARGE)
def test_replaced_linear_is_used_and_captured(peer: Peer):
    tuned, modules = pair(peer)
    path = next(
        name for name, m in tuned.named_modules() if name.startswith(peer.block) and type(m).__name__ == "Linear"
    )
    parent, _, last = path.rpartition(".")
    old = tuned.get_submodule(path)
    torch.manual_seed(1)
    new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
    plain = peer.call(tuned)
    for model in (tuned, modules):
        setattr(model.get_submodule(parent), last, new)
    for _ in range(2):
        assert_close(peer.call(tuned), peer.call(modules))
        assert not torch.allclose(peer.call(tuned), plain, atol=1e-4)
    assert len(lora_fx.inspect(tuned).sites) == len(lora_fx.inspect(modules).sites)


def test_replaced_weight_and_replaced_norm_are_used():
    tuned, modules = pair(LLAMA, fresh=True)
    for model in (tuned, modules):
        layer = model.model.layers[0]
        layer.mlp.down_proj.weight = nn.Parameter(torch.full((32, 48), 0.01), requires_grad=False)
        layer.input_layernorm = nn.LayerNorm(32)
    for _ in range(2):
        assert_close(LLAMA.call(tuned), LLAMA.call(modules))
    assert counts(tuned)[1] >= 1


@each((BERT, VIT), slow=(LLAMA, T5))
def test_other_attention_implementation_is_never_stale(peer: Peer):
    base, graph = (
        peer.build(attn_implementation="sdpa"),
        adapted(peer, random=False, fresh=True, attn_implementation="sdpa"),
    )
    base.requires_grad_(False)
    given = peer.inputs(3, 7)
    with torch.no_grad():
        for way in ("eager", "sdpa", "eager"):
            for model in (base, graph):
                model.set_attn_implementation(way)
            for _ in range(2):
                assert_same(graph(**given), base(**given))
            shown = graph(**given, output_attentions=way == "eager")
            assert_same(shown, base(**given, output_attentions=way == "eager"))


@each((LLAMA, BERT, VIT), slow=(T5,))
def test_changed_dropout_and_changed_activation_are_never_stale(peer: Peer):
    graph, modules = pair(peer)
    for model in (graph, modules):
        for module in model.modules():
            if isinstance(module, nn.Dropout) and not isinstance(module, nn.Identity):
                module.p = 0.5
    for model in (graph, modules):
        model.train()
    for seed in (1, 2):
        results = []
        for model in (graph, modules):
            torch.manual_seed(seed)
            results.append(peer.call(model))
        assert_close(*results)


# -- threads


@each(QUICK, slow=(T5,))
def test_threads_that_call_at_once_get_right_results(peer: Peer):
    graph, modules = pair(peer, fresh=True)
    shapes = [(batch, length) for batch in (1, 2, 3) for length in (1, 5)]
    with torch.no_grad():
        expected = {shape: peer.call(modules, *shape) for shape in shapes}
    wrong = in_threads(lambda turn: differs(peer, graph, shapes[turn % len(shapes)], expected))
    assert not wrong


def differs(peer: Peer, model: nn.Module, shape: tuple[int, int], expected: dict[tuple[int, int], Tensor]) -> bool:
    with torch.no_grad():
        return not torch.allclose(peer.call(model, *shape), expected[shape], rtol=1e-5, atol=1e-5)


def in_threads(wrong, number: int = 4, turns: int = 12) -> list[object]:
    """Return what went wrong: (thread, turn) for each wrong result, or the exception that was raised."""
    results: list[object] = []

    def work(start: int) -> None:
        try:
            torch.set_num_threads(1)
            results.extend((start, turn) for turn in range(turns) if wrong(start + turn))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_with_caches_of_their_own_generate_right_tokens():
    graph, modules = pair(LLAMA, fresh=True)
    prompts = [tokens(batch, length) for batch in (1, 2) for length in (3, 6)]
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    expected = [modules.generate(prompt, **options) for prompt in prompts]

    def wrong(turn: int) -> bool:
        index = turn % len(prompts)
        return not torch.equal(graph.generate(prompts[index], **options), expected[index])

    assert not in_threads(wrong, number=3, turns=4)


def test_thread_check_sees_wrong_results_and_exceptions():
    assert in_threads(lambda turn: turn == 4, number=2, turns=4) == [(1, 3)]
    (error,) = in_threads(lambda turn: 1 // 0, number=1)
    assert isinstance(error, ZeroDivisionError)
    modules = adapted(BERT, "modules")
    assert differs(BERT, modules, (2, 5), {(2, 5): torch.zeros(2, 5)})


def test_forward_of_a_root_region_shows_the_arguments_of_the_model():
    import inspect

    model = zoo.Mlp().eval()
    tuned = lora_fx.apply(model, zoo.rules("**"), (zoo.features(2, 3),))
    assert [region.path for region in lora_fx.inspect(tuned).regions] == [""]
    assert list(inspect.signature(tuned.forward).parameters) == ["x"]
    assert list(inspect.signature(copy.deepcopy(tuned).forward).parameters) == ["x"]


class Marked(Swapped, nn.Module):
    """A mixin of the tests, on top of others."""


def test_module_with_several_mixins_is_copied_and_pickled_with_all_of_them():
    tuned = adapted(BERT, "modules")
    linear = tuned.classifier
    swap(linear, Marked)
    for each_copy in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert type(each_copy) is type(linear)
        assert original_class(each_copy) is nn.Linear
        x = torch.randn(2, 32)
        assert_same(each_copy(x), linear(x))
