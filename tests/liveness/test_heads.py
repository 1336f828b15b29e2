"""Models whose logits are late: found, proven, the same training as without, and every way in which they are read."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lora_fx
from lora_fx.liveness.crossentropy import Loss
from lora_fx.liveness.heads import late_modules
from lora_fx.liveness.rows import LazyRows
from lora_fx.tuned import heads

VOCABULARY = 97
transformers.logging.set_verbosity_error()


def llama(**config: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=VOCABULARY, **config))


def gemma() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    capped = {"head_dim": 8, "final_logit_softcapping": 5.0, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **capped))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64))


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    return BertForMaskedLM(BertConfig(**sizes, vocab_size=VOCABULARY))


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=VOCABULARY, decoder_start_token_id=0))


MODELS = {"llama": llama, "gemma": gemma, "gpt2": gpt2, "bert": bert, "t5": t5}


def batch(labels: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    given = ids.clone()
    given[0, :4] = -100
    return {"input_ids": ids, "labels": given} if labels else {"input_ids": ids}


def with_values(tuned: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in lora_fx.parameters(tuned):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return tuned


def adapted(model: nn.Module, optimise: Any = ("loss",), target: str = "**", **more: Any) -> nn.Module:
    inputs = more.pop("inputs", batch())
    return with_values(lora_fx.apply(model, None, inputs, target=target, r=2, optimise=optimise, **more))


def gradients(tuned: nn.Module) -> list[Tensor]:
    found = [p.grad for p in lora_fx.parameters(tuned) if p.grad is not None]
    tuned.zero_grad()
    return found


def assert_alike(tuned: nn.Module, eager: nn.Module, call: Callable[[nn.Module], Tensor]) -> None:
    """Assert that a step of both gives the same loss and gradients but for rounding."""
    losses, found = [], []
    for model in (tuned, eager):
        torch.manual_seed(5)
        loss = call(model)
        loss.backward()
        losses.append(loss.detach())
        found.append(gradients(model))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in found[1])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * largest)


@functools.cache
def _llamas() -> tuple[nn.Module, nn.Module]:
    base = llama()
    return adapted(base), adapted(base, False)


def llamas() -> tuple[nn.Module, nn.Module]:
    """Return two models of the same values, one late and one not, without gradients."""
    tuned, eager = _llamas()
    for model in (tuned, eager):
        with_values(model).zero_grad()
    only_state(tuned).calls = 0
    only_state(tuned).otherwise.clear()
    return tuned, eager


def only_state(tuned: nn.Module) -> Any:
    ((_, state),) = late_modules(tuned)
    return state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"), [(name, "**") for name in MODELS] + [(name, "**.[qc]*") for name in ("llama", "bert")]
)
def test_the_head_of_a_model_is_found_and_trains_as_it_does_whole(name: str, target: str):
    base = MODELS[name]()
    inputs = batch(labels=name in ("t5", "llama"))
    tuned, eager = adapted(base, target=target, inputs=inputs), adapted(base, False, target, inputs=inputs)
    for mode in (True, False):
        tuned.train(mode)
        eager.train(mode)
        assert_alike(tuned, eager, lambda model: model(**batch()).loss)
    outputs = tuned(**batch())
    assert type(outputs.logits) is LazyRows
    assert not outputs.logits.lazy_value.is_whole
    assert only_state(tuned).calls == 3
    torch.testing.assert_close(outputs.logits, eager(**batch()).logits, rtol=0, atol=1e-6)
    (late,) = lora_fx.inspect(tuned).late
    assert (late.optimisation, late.refused) == ("loss", "")
    assert "left for later" in str(lora_fx.inspect(tuned))


def test_a_loss_outside_of_the_model_is_chunked_too():
    base, labels = llama(), batch()["labels"]
    tuned, eager = adapted(base, inputs=batch(False)), adapted(base, False)

    def call(model: nn.Module) -> Tensor:
        logits = model(batch()["input_ids"]).logits
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY).float(), labels[:, 1:].reshape(-1))
        assert type(logits) is Tensor or not logits.lazy_value.is_whole
        return loss

    assert_alike(tuned, eager, call)


READS: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda out: out.logits.argmax(-1),
    "detached numpy": lambda out: torch.from_numpy(out.logits.detach().cpu().numpy()),
    "tuple": lambda out: out.to_tuple()[1] + 0,
    "second item": lambda out: out[1][0, 0, 0],
    "pickle": lambda out: pickle.loads(pickle.dumps(out.logits)),
    "shape": lambda out: torch.tensor(out.logits.shape),
    "norm": lambda out: torch.linalg.vector_norm(out["logits"]),
}


@pytest.mark.parametrize("when", ["before", "after", "after a step"])
def test_whoever_reads_the_logits_gets_them_before_and_after_the_backward_pass(when: str):
    for read in READS.values():
        results = []
        for model in llamas():
            optimiser = torch.optim.AdamW(lora_fx.parameters(model), lr=0.1)
            outputs = model(**batch())
            result = read(outputs) if when == "before" else None
            outputs.loss.backward()
            if when == "after a step":
                optimiser.step()
            results.append(read(outputs) if result is None else result)
        torch.testing.assert_close(*(result.detach() for result in results), rtol=1e-5, atol=1e-6)


def test_without_gradients_in_eval_and_in_generate_everything_is_as_before_bit_by_bit():
    tuned, eager = llamas()
    with torch.no_grad():
        one, other = tuned(**batch()), eager(**batch())
        assert type(one.logits) is Tensor
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(one.logits, other.logits)
    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(tuned.generate(batch()["input_ids"], **given), eager.generate(batch()["input_ids"], **given))
    assert only_state(tuned).otherwise["no gradients are computed"] > 0


def test_switched_off_removed_and_merged_models_compute_what_they_did_before():
    base = llama()
    tuned = adapted(base)
    expected = base(**batch())
    with lora_fx.disabled(tuned):
        inside = tuned(**batch())
        assert torch.equal(inside.loss, expected.loss)
        assert type(inside.logits) is Tensor
    for plain in (lora_fx.remove(tuned), lora_fx.merge(tuned)):
        assert type(plain.lm_head) is nn.Linear
        assert not [name for module in plain.modules() for name in vars(module) if name.startswith("lora_fx_late")]
        assert type(plain(**batch()).logits) is Tensor
    assert type(tuned(**batch()).logits) is LazyRows


def test_copies_and_saved_models_are_late_too():
    tuned, _ = llamas()
    file = io.BytesIO()
    torch.save(tuned, file)
    file.seek(0)
    for other in (copy.deepcopy(tuned), torch.load(file, weights_only=False)):
        assert_alike(other, tuned, lambda model: model(**batch()).loss)
        assert type(other(**batch()).logits) is LazyRows


def test_accumulated_gradients_and_kept_graphs_are_as_without():
    def twice(model: nn.Module) -> Tensor:
        for _ in range(2):
            (model(**batch()).loss / 3).backward()
        loss = model(**batch()).loss
        loss.backward(retain_graph=True)
        return loss

    assert_alike(*llamas(), twice)


def test_autocast_computes_what_it_computes_without():
    def call(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch()).loss

    tuned, eager = llamas()
    losses = [call(model) for model in (tuned, eager)]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    for loss in losses:
        loss.backward()
    for one, other in zip(gradients(tuned), gradients(eager), strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.03 * float(other.abs().max()))
    assert only_state(tuned).calls == 1


def reason_of_the_last_call(tuned: nn.Module, call: Callable[[], Any]) -> str:
    state = only_state(tuned)
    state.otherwise.clear()
    before = state.calls
    call()
    assert state.calls == before
    (reason,) = state.otherwise
    return str(reason)


def test_calls_that_cannot_be_late_say_why_and_are_right():
    tuned, eager = llamas()

    def train() -> None:
        assert_alike(tuned, eager, lambda model: model(**batch()).loss)

    handle = tuned.lm_head.register_forward_hook(lambda module, args, result: None)
    assert "hooks" in reason_of_the_last_call(tuned, train)
    handle.remove()
    hidden = torch.randn(2, 32, requires_grad=True)
    again = reason_of_the_last_call(tuned, lambda: checkpoint(tuned.lm_head, hidden, use_reentrant=False))
    assert "run again" in again
    assert "no gradients" in reason_of_the_last_call(
        tuned, lambda: checkpoint(tuned.lm_head, hidden, use_reentrant=True)
    )
    tuned.lm_head._parameters["weight"].requires_grad_()
    assert "trained" in reason_of_the_last_call(tuned, lambda: tuned(**batch()))
    tuned.lm_head._parameters["weight"].requires_grad_(False)
    train()
    frozen = adapted(llama(), target="**.q_proj")
    assert "no gradient passes" in reason_of_the_last_call(frozen, lambda: frozen.lm_head(torch.zeros(2, 32)))
    assert "follows" in reason_of_the_last_call(
        frozen, lambda: torch.func.grad(lambda x: frozen.lm_head(x).sum())(hidden)
    )


def test_dropout_in_the_adapter_of_the_head_keeps_it_whole_in_training_with_the_same_masks():
    base = llama()
    rules = {"version": 1, "rules": [{"match": {"name": "lm_head"}, "lora": {"r": 4, "dropout": 0.3}}]}
    tuned, eager = (with_values(lora_fx.apply(base, rules, batch(), optimise=o)).train() for o in (["loss"], False))
    assert "dropout" in reason_of_the_last_call(
        tuned, lambda: assert_alike(tuned, eager, lambda model: model(**batch()).loss)
    )
    tuned.eval()
    assert type(tuned(**batch()).logits) is LazyRows


class Tiny(nn.Module):
    """No repeated blocks: the whole model is one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


class Softmax(nn.Module):
    """A model that reads its logits itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids).logits.softmax(-1)


def test_models_whose_logits_cannot_be_late_say_why():
    ids = (batch()["input_ids"],)
    tiny = adapted(Tiny(), inputs=ids)
    assert [late.refused for late in lora_fx.inspect(tiny).late] == ["the whole model runs as one graph"]
    reading = adapted(Softmax(), target="**.q_proj", inputs=ids)
    ((path, reason),) = ((late.path, late.refused) for late in lora_fx.inspect(reading).late)
    assert path == ""
    assert "only a loss reads" in reason
    assert "no loss: " in str(lora_fx.inspect(reading))
    meta = lora_fx.apply(llama().to("meta"), None, target="**.q_proj", optimise=["loss"])
    assert "meta" in lora_fx.inspect(meta).late[0].refused
    plain = adapted(llama(), ["stack", "recompute"])
    assert lora_fx.inspect(plain).late == ()
    modules = adapted(Tiny(), inputs=ids, backend="modules")
    assert lora_fx.inspect(modules).late[0].refused


def test_without_inputs_a_model_that_names_its_head_is_taken_at_its_word_and_compared():
    base = llama()
    tuned, eager = (
        with_values(lora_fx.apply(base, None, target="**", r=2, backend="modules", optimise=o))
        for o in (["loss"], False)
    )
    assert only_state(tuned).path == "lm_head"
    assert_alike(tuned, eager, lambda model: model(**batch()).loss)
    assert type(tuned(**batch()).logits) is LazyRows


def test_a_head_that_would_be_wrong_late_is_not_late(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heads, "_difference", lambda head: "the result differs")
    tuned = adapted(llama())
    assert not late_modules(tuned)
    assert lora_fx.inspect(tuned).late[0].refused == "the result differs"


@pytest.mark.parametrize(("wrong", "what"), [("_to_gradient", "gradient"), ("_weights", "result")])
def test_the_comparison_finds_a_loss_or_a_gradient_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, wrong: str, what: str
):
    right = getattr(Loss, wrong)

    def spoiled(self: Loss, *args: Any) -> Any:
        if what == "gradient":
            return args[0].zero_()
        on_label, spread, total = right(self, *args)
        return on_label * 1.01, spread, total

    monkeypatch.setattr(Loss, wrong, spoiled)
    tuned = adapted(llama(), target="**.q_proj")
    (late,) = lora_fx.inspect(tuned).late
    assert what in late.refused


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(ValueError, match="stack, recompute, attention, halve, compile, loss"):
        adapted(llama(), ["lost"])
