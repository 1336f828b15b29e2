"""An adapter for each row in what stands around a model: encoders, beams, wrappers, compilers, copies, other choices."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close

import lora_fx
from tests.support.processes import in_processes
from tests.support.twoadapters import BACKENDS, model, two

MIXED = ["b", None, "a", "a"]


def batch(rows: int = 4, tokens: int = 5) -> Tensor:
    return torch.randn(rows, tokens, 6, generator=torch.Generator().manual_seed(2))


def one_by_one(tuned: nn.Module, names: list[str | None], x: Tensor) -> Tensor:
    results = []
    for number, name in enumerate(names):
        with lora_fx.use(tuned, name):
            results.append(tuned(x[number : number + 1]))
    return torch.cat(results)


# -- transformers' models of two parts, and how they generate


RULES = {
    "version": 1,
    "rules": [{"match": {"name": "**.{q,v,wo,q_proj,v_proj,fc2}"}, "lora": {"r": 4, "alpha": 64, "init": "random"}}],
}


def t5(transformers: Any) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart(transformers: Any) -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_attention_heads=4, decoder_ffn_dim=48, max_position_embeddings=40, eos_token_id=None, bos_token_id=1,
        forced_eos_token_id=None, decoder_start_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def llama(transformers: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def adapted(kind: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tuned = lora_fx.apply(kind(transformers).eval(), RULES, backend="modules")
    lora_fx.rename(tuned, "default", "a")
    lora_fx.add(tuned, RULES, adapter="b")
    return tuned


def prompts(rows: int = 3, length: int = 6) -> Tensor:
    return torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(0))


NAMES = ["a", None, "b"]
TWO_PARTS = pytest.mark.parametrize("kind", [t5, bart], ids=lambda kind: kind.__name__)


@TWO_PARTS
@pytest.mark.parametrize("length", [6, 3])
def test_encoder_decoder_and_cross_attention_follow_the_rows(kind, length):
    tuned, ids = adapted(kind), prompts(3, length)
    mask, labels = torch.ones_like(ids), prompts(3, 3) + 1
    mask[1, 2:] = 0
    with lora_fx.rows(tuned, NAMES):
        together = tuned(input_ids=ids, attention_mask=mask, labels=labels).logits
    for row, name in enumerate(NAMES):
        one = slice(row, row + 1)
        with lora_fx.use(tuned, name):
            expected = tuned(input_ids=ids[one], attention_mask=mask[one], labels=labels[one]).logits
        assert_close(together[one], expected, atol=1e-5, rtol=1e-5)


@TWO_PARTS
def test_generation_calls_the_encoder_by_itself_and_follows_the_rows(kind):
    tuned, ids = adapted(kind), prompts()
    options = {"max_new_tokens": 6, "do_sample": False}
    with lora_fx.rows(tuned, NAMES):
        together = tuned.generate(ids, **options)
    for row, name in enumerate(NAMES):
        with lora_fx.use(tuned, name):
            assert torch.equal(tuned.generate(ids[row : row + 1], **options)[0], together[row])


BEAMS = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}


def test_beams_of_a_prompt_are_rows_with_its_name():
    tuned, ids = adapted(llama), prompts()
    with lora_fx.rows(tuned, [name for name in NAMES for _ in range(3)]):
        together = tuned.generate(ids, **BEAMS)
    for row, name in enumerate(NAMES):
        with lora_fx.use(tuned, name):
            assert torch.equal(tuned.generate(ids[row : row + 1], **BEAMS)[0], together[row])


def test_several_sequences_of_a_prompt_are_rows_with_its_name():
    tuned, ids = adapted(llama), prompts()
    options = {**BEAMS, "num_return_sequences": 3}
    with lora_fx.rows(tuned, [name for name in NAMES for _ in range(3)]):
        together = tuned.generate(ids, **options)
    for row, name in enumerate(NAMES):
        with lora_fx.use(tuned, name):
            expected = tuned.generate(ids[row : row + 1], **options)
        assert torch.equal(expected, together[3 * row : 3 * row + 3])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_beams_without_names_are_refused(options):
    tuned = adapted(llama)
    with lora_fx.rows(tuned, NAMES), pytest.raises(lora_fx.RefusedError, match=r"for 3 rows[\s\S]*num_beams"):
        tuned.generate(prompts(), max_new_tokens=3, **options)


@TWO_PARTS
def test_beams_of_an_encoder_decoder_begin_as_its_prompts(kind):
    tuned, ids = adapted(kind), prompts()
    with lora_fx.rows(tuned, [name for name in NAMES for _ in range(3)]):
        together = tuned.generate(ids, **BEAMS)
        again = tuned.generate(ids, **BEAMS)
    assert torch.equal(together, again)
    for row, name in enumerate(NAMES):
        with lora_fx.use(tuned, name):
            assert torch.equal(tuned.generate(ids[row : row + 1], **BEAMS)[0], together[row])
    with lora_fx.rows(tuned, ["a"] * 3):
        assert torch.equal(tuned.generate(ids[:1], **BEAMS)[0], together[0])


def test_names_that_are_not_of_prompts_one_after_the_other_are_refused_by_the_encoder():
    tuned = adapted(bart)
    with lora_fx.rows(tuned, NAMES * 3), pytest.raises(lora_fx.RefusedError, match="for 9 rows"):
        tuned.generate(prompts(), **BEAMS)


def fail(*_: object) -> None:
    raise ValueError("as it shall")


def test_an_encoder_that_fails_leaves_no_choice_behind():
    tuned, ids = adapted(bart), prompts()
    expected = tuned(input_ids=ids, decoder_input_ids=ids).logits
    with lora_fx.rows(tuned, [name for name in NAMES for _ in range(3)]):
        tuned.get_encoder()(ids)
        failing = tuned.model.encoder.layers[0].register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="as it shall"):
            tuned.get_encoder()(ids)
        failing.remove()
        with pytest.raises(lora_fx.RefusedError, match="for 9 rows"):
            tuned(input_ids=ids, decoder_input_ids=ids)
    assert torch.equal(tuned(input_ids=ids, decoder_input_ids=ids).logits, expected)


# -- layers


def test_attention_that_reads_its_weights_is_refused_by_name():
    rules = {"version": 1, "rules": [{"match": {"name": "**"}, "lora": {"r": 2}}]}
    tuned = lora_fx.apply(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), rules, (batch(),), backend="modules")
    with pytest.raises(lora_fx.RefusedError, match="code reads"), lora_fx.rows(tuned, ["default", None]):
        pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_a_quantised_base_takes_rows(kind):
    quantization = pytest.importorskip("torchao.quantization")
    base = model()
    quantization.quantize_(base, getattr(quantization, kind)())
    rules = {"version": 1, "rules": [{"match": {"name": "**"}, "lora": {"r": 2, "init": "random"}}]}
    tuned = lora_fx.apply(base, rules, (batch(),))
    lora_fx.rename(tuned, "default", "a")
    lora_fx.add(tuned, rules, adapter="b")
    with lora_fx.rows(tuned, MIXED):
        together = tuned(batch())
    assert_close(together, one_by_one(tuned, MIXED, batch()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast_take_rows(dtype):
    tuned = two()
    with lora_fx.rows(tuned, MIXED), torch.autocast("cpu", dtype):
        together = tuned(batch())
    with torch.autocast("cpu", dtype):
        expected = one_by_one(tuned, MIXED, batch())
    assert_close(together, expected, atol=2e-2, rtol=2e-2)
    half = two().to(dtype)
    with lora_fx.rows(half, MIXED):
        together = half(batch().to(dtype))
    assert_close(together, one_by_one(half, MIXED, batch().to(dtype)), atol=5e-2, rtol=5e-2)


# -- wrappers and compilers


def train_jobs_in_data_parallel(_: Path) -> None:
    tuned, plain = two(), two()
    wrapped = nn.parallel.DistributedDataParallel(tuned, find_unused_parameters=True)
    for tried, called in ((tuned, wrapped), (plain, plain)):
        for _ in range(2):
            tried.zero_grad()
            with lora_fx.rows(called, MIXED):
                called(batch()).square().sum().backward()
    for one, other in zip(tuned.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            assert torch.equal(one.grad, other.grad)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_data_parallel_trains_jobs(tmp_path: Path):
    in_processes(1, train_jobs_in_data_parallel, tmp_path)


@BACKENDS
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "afterwards"])
def test_checkpointed_blocks_use_the_rows_once_more(inputs, inside):
    tuned = two(inputs)
    gradients = []
    for checkpoints in (False, True):
        tuned.zero_grad()
        tuned.checkpoints = checkpoints
        with lora_fx.rows(tuned, MIXED):
            loss = tuned(batch()).square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append({name: p.grad.clone() for name, p in tuned.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert_close(again[name], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_code_serves_the_contexts_that_follow():
    torch.compiler.reset()
    made = []

    def backend(graph: Any, _inputs: object) -> Any:
        made.append(graph)
        return graph.forward

    tuned = two()
    compiled = torch.compile(tuned, backend=backend)
    with torch.no_grad():
        compiled(batch())  # before there are rows
        for names in (MIXED, ["a", "b", "b", None], MIXED):
            with lora_fx.rows(compiled, names):
                together = compiled(batch())
            assert_close(together, one_by_one(tuned, names, batch()), atol=1e-6, rtol=1e-6)
            compiled(batch())
        before = len(made)
        for names in (["b", "b", "a", None], [None, "a", None, "b"]):
            with lora_fx.rows(compiled, names):
                together = compiled(batch())
            assert_close(together, one_by_one(tuned, names, batch()), atol=1e-6, rtol=1e-6)
        with lora_fx.rows(compiled, ["a", "b"]), pytest.raises(lora_fx.RefusedError, match="for 2 rows"):
            compiled(batch())
    assert len(made) == before


# -- copies


def saved_and_loaded(tuned: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(tuned, file)
    file.seek(0)
    read: nn.Module = torch.load(file, weights_only=False)
    return read


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": saved_and_loaded}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("called", [False, True], ids=["before", "after a call"])
def test_a_copy_that_is_made_inside_is_whole_and_has_nothing_of_the_context(how, called):
    tuned = two()
    expected = tuned(batch())
    with lora_fx.rows(tuned, MIXED):
        if called:
            tuned(batch())
        twin = COPIES[how](tuned)
        assert torch.equal(twin(batch()), expected)
    assert torch.equal(twin(batch()), expected)
    assert not twin._forward_pre_hooks
    assert not twin._forward_pre_hooks_with_kwargs
    assert not twin._forward_hooks
    with lora_fx.rows(twin, MIXED):
        together = twin(batch())
    assert_close(together, one_by_one(twin, MIXED, batch()), atol=1e-6, rtol=1e-6)
    assert not twin._forward_pre_hooks


def test_the_base_that_is_taken_out_inside_has_no_hook():
    tuned = two()
    with lora_fx.rows(tuned, MIXED):
        base = lora_fx.remove(tuned)
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    assert torch.equal(base(batch()), model()(batch()))
