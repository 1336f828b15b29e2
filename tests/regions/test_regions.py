"""Regions at run time: what makes a call hit or miss, what is shared, and what users do to an adapted model."""

from __future__ import annotations

import re
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.errors import LoraFxWarning
from lora_fx.regions import learning
from lora_fx.regions import region as region_module
from lora_fx.regions.install import regions
from tests.support import zoo
from tests.support.zoo import rules


def tuned_encoder(**lora: object) -> nn.Module:
    model = zoo.Encoder().eval()
    return lora_fx.apply(model, rules("**.{query,value,output}", **lora), zoo.call_encoder())


def counts(tuned: nn.Module) -> tuple[int, dict[str, int]]:
    """Hits and misses of all regions since the model was adapted."""
    report = lora_fx.inspect(tuned)
    misses: dict[str, int] = {}
    for region in report.regions:
        for reason, number in region.misses.items():
            misses[reason] = misses.get(reason, 0) + number
    return sum(region.hits for region in report.regions), misses


def test_other_sizes_batch_one_and_length_one_hit_without_a_miss():
    tuned = tuned_encoder()
    with torch.no_grad():
        for batch, length in ((3, 9), (1, 6), (5, 1), (1, 1), (7, 40)):
            tuned(**zoo.call_encoder(batch, length).kwargs)
    assert counts(tuned) == (15, {})


def test_train_mode_with_gradients_hits_without_a_miss():
    tuned = tuned_encoder(dropout=0.1).train()
    for batch, length in ((3, 9), (1, 6)):
        tuned(**zoo.call_encoder(batch, length).kwargs)
    assert counts(tuned) == (6, {})


def test_identical_blocks_are_captured_once():
    tuned = tuned_encoder()
    kinds = {id(region.block) for _, _, region in regions(tuned)}
    assert len(kinds) == 1
    (report, *_) = lora_fx.inspect(tuned).regions
    assert report.graphs == 2, "with a mask and without; inference and training share them: nothing asks for the mode"


def test_blocks_with_other_ranks_do_not_share_a_graph():
    mixed = {
        "version": 1,
        "rules": [
            {"match": {"name": "layer.0.**.query"}, "lora": {"r": 2}},
            {"match": {"name": "layer.{1,2}.**.query"}, "lora": {"r": 4}},
        ],
    }
    tuned = lora_fx.apply(zoo.Encoder().eval(), mixed, zoo.call_encoder())
    assert len({id(region.block) for _, _, region in regions(tuned)}) == 2


def test_missing_mask_was_made_up_while_planning_and_hits():
    tuned = tuned_encoder()
    ids = zoo.tokens(2, 6)
    with torch.no_grad():
        assert torch.equal(tuned(ids), lora_fx.remove(tuned)(ids))
    assert counts(tuned) == (3, {})


def test_mask_that_was_never_seen_misses_once_names_the_argument_and_is_captured():
    model = zoo.Encoder().eval()
    tuned = lora_fx.apply(model, rules("**.{query,value,output}"), lora_fx.call(zoo.tokens(2, 6)))
    call = zoo.call_encoder()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(tuned(**call.kwargs), model(**call.kwargs))
    assert counts(tuned) == (8, {"value of mask": 1})


def test_other_dtype_misses_and_is_captured():
    tuned = tuned_encoder().double()
    call = zoo.call_encoder()
    mask = call.kwargs["attention_mask"].double()
    with torch.no_grad():
        for _ in range(2):
            out = tuned(call.kwargs["input_ids"], mask)
    assert out.dtype == torch.float64
    assert counts(tuned)[1] == {"dtype of hidden": 1}


def test_autocast_misses_and_is_captured():
    tuned = tuned_encoder()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            tuned(**zoo.call_encoder().kwargs)
    assert counts(tuned)[1] == {"autocast on cpu": 1}


def test_gradients_in_eval_mode_use_the_training_graph_where_nothing_depends_on_the_mode():
    tuned = tuned_encoder()
    tuned(**zoo.call_encoder().kwargs).sum().backward()
    assert counts(tuned) == (3, {})


def test_changed_attribute_misses_and_is_never_stale():
    model = zoo.Encoder().eval()
    tuned = lora_fx.apply(model, rules("**.query"), zoo.call_encoder())
    for either in (model, tuned):
        either.layer[1].attention.heads = 2
    call = zoo.call_encoder()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(tuned(**call.kwargs), model(**call.kwargs))
    assert counts(tuned)[1] == {"value of attention.heads": 1}


class Config:
    def __init__(self) -> None:
        self.activation = "gelu"


class Configured(nn.Module):
    """A block that asks a configuration object, as transformers' do."""

    class Block(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.config, self.fc = config, nn.Linear(16, 16)

        def forward(self, x):
            return getattr(F, self.config.activation)(self.fc(x))

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.blocks = nn.ModuleList(self.Block(self.config) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_changed_configuration_is_never_stale():
    model = Configured().eval()
    tuned = lora_fx.apply(model, rules("**"), (zoo.features(2, 3),))
    x = zoo.features(4, 3)
    with torch.no_grad():
        for activation in ("gelu", "relu", "gelu", "tanh"):
            model.config.activation = tuned.config.activation = activation
            assert torch.equal(tuned(x), model(x))
    assert counts(tuned)[1] == {"value of config.activation": 2}


def test_hook_on_an_inner_module_fires():
    tuned = tuned_encoder()
    seen = []
    handle = tuned.layer[1].attention.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        tuned(**zoo.call_encoder(3, 5).kwargs)
        handle.remove()
        tuned(**zoo.call_encoder(3, 5).kwargs)
    assert seen == [(3, 5, 16)]


def test_hook_on_an_adapted_linear_fires_and_its_result_counts():
    model = zoo.Encoder().eval()
    tuned = lora_fx.apply(model, rules("**.query"), zoo.call_encoder())
    for either in (model, tuned):
        either.layer[0].attention.query.register_forward_hook(lambda module, args, out: 3 * out)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(tuned(**zoo.call_encoder().kwargs), model(**zoo.call_encoder().kwargs))


def test_replaced_submodule_is_used():
    model = zoo.Encoder().eval()
    tuned = lora_fx.apply(model, rules("**.query"), zoo.call_encoder())
    new = nn.Linear(16, 16)
    for either in (model, tuned):
        either.layer[0].attention.dense = new
        either.layer[1].attention.query = new
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(tuned(**zoo.call_encoder().kwargs), model(**zoo.call_encoder().kwargs))


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_state_dict_is_used(assign):
    tuned, other = tuned_encoder(init="random"), tuned_encoder(init="random")
    tuned.load_state_dict(other.state_dict(), assign=assign)
    with torch.no_grad():
        assert torch.equal(tuned(**zoo.call_encoder(3, 4).kwargs), other(**zoo.call_encoder(3, 4).kwargs))


def test_keep_to_a_bounded_number_of_graphs_and_warn_with_the_cause(monkeypatch):
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x, factor):
            return self.fc(x) * factor

    monkeypatch.setattr(region_module, "MOST_GRAPHS", 3)
    model = Loop().eval()
    tuned = lora_fx.apply(model, rules("fc"), (zoo.features(2, 3), 1.0))
    x = zoo.features(2, 3)
    with torch.no_grad(), pytest.warns(LoraFxWarning, match="value of factor"):
        for factor in range(2, 9):
            assert torch.equal(tuned(x, float(factor)), model(x, float(factor)))


class Stack(zoo.ModeDependent):
    """Checkpoints its blocks, as training scripts do."""

    reentrant = False

    def forward(self, x):
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.filterwarnings("ignore:no gradient reaches")  # reentrant, of an input without one: so it is
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_recomputed_and_gradients_stay_the_same(reentrant, monkeypatch):
    monkeypatch.setattr(Stack, "reentrant", reentrant)
    tuned = lora_fx.apply(Stack(), rules("**", init="random"), (zoo.features(2, 3),)).train()
    plain = lora_fx.apply(zoo.ModeDependent(), rules("**"), backend="modules").train()
    plain.load_state_dict(tuned.state_dict())
    x = zoo.features(4, 5).requires_grad_()
    gradients = []
    for model in (tuned, plain):
        model(x).square().sum().backward()
        gradients.append([p.grad for p in lora_fx.parameters(model)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    hits, misses = counts(tuned)
    assert hits + sum(misses.values()) == 4, "each of two blocks runs twice"


def test_several_threads_may_call_at_once():
    tuned = tuned_encoder(init="random")
    samples = [zoo.call_encoder(batch, length) for batch in (1, 2, 3) for length in (1, 4, 9)]
    with torch.no_grad():
        expected = [lora_fx.apply(zoo.Encoder(), rules("**.query"), backend="modules")]
        modules = expected[0].eval()
        modules = lora_fx.apply(zoo.Encoder().eval(), rules("**.{query,value,output}"), backend="modules")
        modules.load_state_dict(tuned.state_dict())
        expected = [modules(**sample.kwargs) for sample in samples]
    wrong: list[int] = []

    def work(start: int) -> None:
        with torch.no_grad():
            for turn in range(30):
                index = (start + turn) % len(samples)
                if not torch.equal(tuned(**samples[index].kwargs), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_adapted_model_has_no_more_graph_breaks_than_its_base():
    model = zoo.Encoder().eval()
    tuned = lora_fx.apply(model, rules("**.query", init="random"), zoo.call_encoder())
    call = zoo.call_encoder()
    breaks = []
    for either in (model, tuned):
        torch._dynamo.reset()
        explained = torch._dynamo.explain(either)(**call.kwargs)
        breaks.append(explained.graph_break_count)
    assert breaks[1] <= breaks[0]
    torch._dynamo.reset()
    compiled = torch.compile(tuned, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**call.kwargs), tuned(**call.kwargs))


def test_adapted_model_can_be_exported():
    tuned = lora_fx.apply(zoo.Encoder().eval(), rules("**.query", init="random"), zoo.call_encoder())
    call = zoo.call_encoder()
    program = torch.export.export(tuned, (), dict(call.kwargs))
    torch.testing.assert_close(program.module()(**call.kwargs), tuned(**call.kwargs))
    assert any("lora_A" in name for name in program.state_dict)


def test_flop_counter_sees_the_adapter_and_not_the_capture():
    from torch.utils.flop_counter import FlopCounterMode

    model = zoo.Mlp().eval()
    tuned = lora_fx.apply(model, rules("fc1", r=4), (zoo.features(2, 3),))
    with torch.no_grad():
        with FlopCounterMode(display=False) as base:
            model(zoo.features(2, 3))
        with FlopCounterMode(display=False) as adapted:
            tuned(zoo.features(2, 3))
        with FlopCounterMode(display=False) as missing:
            tuned(zoo.features(2, 3).expand(1, 2, 3, 16))
    assert adapted.get_total_flops() - base.get_total_flops() == 2 * 6 * 4 * (16 + 32)
    assert missing.get_total_flops() == adapted.get_total_flops()


def test_inspect_tells_regions_hits_misses_and_capture_time():
    tuned = tuned_encoder()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        tuned(zoo.tokens(2, 6))
    report = lora_fx.inspect(tuned)
    assert [region.path for region in report.regions] == ["layer.0", "layer.1", "layer.2"]
    assert report.regions[0].seconds > 0
    assert re.search(r"^  layer\.0 +3 graphs  ", str(report), re.MULTILINE)
    assert "1 × autocast on cpu" in str(report)
    assert re.search(r"^  layer\.\{1\.\.2\}  ×2  3 graphs  .*  no misses  ", str(report), re.MULTILINE)
    assert '"misses": {' in report.to_json()
    guards = report.regions[0].guards
    assert {"dtype of hidden", "autocast on cpu", "value of attention.heads"} <= set(guards)
    assert f"{len(guards)} guards, " in str(report)


def test_error_of_a_capture_is_a_reason_and_never_the_users(monkeypatch):
    tuned = tuned_encoder()
    call = zoo.call_encoder()

    def broken(captured, module, passes, static):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(learning, "program_for", broken)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tuned(**call.kwargs), lora_fx.remove(tuned)(**call.kwargs))
    assert "the capture failed: RuntimeError: broken on purpose" in lora_fx.inspect(tuned).regions[0].failures


@pytest.mark.parametrize(("name", "value"), [("eps", 0.5), ("weight", nn.Parameter(torch.full((4,), 2.0)))])
def test_what_a_norm_gets_later_instead_of_none_is_used(name, value):
    models = [nn.Sequential(nn.Sequential(nn.RMSNorm(4, elementwise_affine=False), nn.Linear(4, 4))) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    those = {"version": 1, "rules": [{"match": {"name": "0.1"}, "lora": {"r": 2}}]}
    x = torch.randn(3, 4)
    tuned, same = (lora_fx.apply(m, those, (x,), backend=b) for m, b in zip(models, ("auto", "modules"), strict=True))
    for _ in range(2):
        assert torch.equal(tuned(x), same(x))
        for model in (tuned, same):
            setattr(model[0][0], name, value)
