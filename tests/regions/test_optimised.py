"""Programs that are cheaper to train (stack, recompute): proven, equal to the module backend, and cheaper indeed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx.bench.counters import saved_bytes
from lora_fx.regions.install import regions
from lora_fx.regions.program import Program
from tests.support import zoo
from tests.support.peers import BERT, LLAMA, T5, VIT, VOCABULARY, Peer, adapted, assert_same, tokens
from tests.support.peers import each as each_of

Run = list[Tensor | None]


def gpt2(**config: Any) -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64, "pad_token_id": 0}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=5, **config))


GPT2 = Peer("gpt2", gpt2, lambda batch, length: {"input_ids": tokens(batch, length)}, "transformer.h.0", "mlp")
ALL = each_of((LLAMA, BERT, GPT2, VIT), slow=(T5,))


def programs(tuned: nn.Module) -> list[Program]:
    return [program for _, _, region in regions(tuned) for program in region.block.programs]


def fast_passes(tuned: nn.Module) -> set[str]:
    """Return the names of the passes of all fast programs that are proven."""
    return {name for program in programs(tuned) for name in program.optimised}


def trained(model: nn.Module, call: Callable[[nn.Module], Tensor], again: bool = False) -> Run:
    """Return the result of a step and all gradients; `again`, those of their squared norm too."""
    torch.manual_seed(5)
    result = call(model)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first = torch.autograd.grad(result.float().square().mean(), wanted, create_graph=again, allow_unused=True)
    tensors = [result.detach(), *first]
    if again:
        norm = sum(gradient.square().sum() for gradient in first if gradient is not None)
        tensors += torch.autograd.grad(norm, wanted, allow_unused=True)
    return tensors


def assert_equal_but_for_rounding(result: Run, expected: Run, values: float = 1e-6, slopes: float = 1e-5) -> None:
    """Assert that results, and gradients in units of the largest, are those of another run."""
    assert [tensor is None for tensor in result] == [tensor is None for tensor in expected]
    largest = max(float(tensor.detach().abs().max()) for tensor in expected[1:] if tensor is not None)
    for number, (one, other) in enumerate(zip(result, expected, strict=True)):
        if one is not None:
            difference = float((one - other).detach().abs().max())
            assert difference <= (
                slopes * largest if number else values * max(1.0, float(other.detach().abs().max()))
            ), number


@ALL
@pytest.mark.parametrize("p", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_fast_programs_are_proven_and_give_the_results_and_gradients_of_the_module_backend(peer: Peer, p: float):
    fast, modules = adapted(peer, dropout=p), adapted(peer, "modules", dropout=p)
    for shape in ((3, 7), (2, 5), (3, 7)):
        runs = [trained(tuned.train(), lambda model, s=shape: peer.call(model, *s)) for tuned in (fast, modules)]
        assert_equal_but_for_rounding(*runs, values=1e-5 if peer is T5 else 1e-6)  # its scores are not scaled
    assert fast_passes(fast) >= ({"recompute"} if peer is GPT2 else {"stack", "recompute"})
    assert not [program.why_not_fast for program in programs(fast) if program.why_not_fast]


@pytest.mark.slow
@ALL
def test_fast_programs_keep_fewer_bytes(peer: Peer):
    sizes = []
    for optimise in (True, False):
        tuned = adapted(peer, optimise=optimise).train()
        peer.call(tuned)
        sizes.append(saved_bytes(lambda model=tuned: peer.call(model), [*tuned.parameters(), *tuned.buffers()]))
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(("dtype", "part"), [(torch.float32, 0.88), (torch.bfloat16, 0.78)], ids=str)
def test_adapted_llama_keeps_fewer_bytes_than_its_frozen_base(dtype: torch.dtype, part: float):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 352}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)).to(dtype).train()
    given = torch.randn(2, 256, 128, dtype=dtype, requires_grad=True)
    rules = {"version": 1, "rules": [{"match": {"name": "**.layers.**", "op": "linear"}, "lora": {"r": 2}}]}
    tuned = lora_fx.apply(base, rules, {"inputs_embeds": given, "use_cache": False}).train()
    frozen = copy.deepcopy(base).requires_grad_(False)
    kept = []
    for model in (tuned, frozen):
        model(inputs_embeds=given, use_cache=False)
        own = [*model.parameters(), *model.buffers()]
        kept.append(saved_bytes(lambda m=model: m(inputs_embeds=given, use_cache=False), own))
    assert kept[0] < part * kept[1], "norms in float32 of a half-precision stream are made from that again"


class ThinProducts(TorchDispatchMode):
    """Counts products of a few rows (A, or several of them) by x."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.number = rows, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[0].shape[0] <= 8 and args[1].shape[1] == self.rows:
            self.number += 1
        return func(*args, **(kwargs or {}))


def test_siblings_share_one_product_by_a():
    products = {}
    for optimise in (True, False):
        tuned = adapted(LLAMA, optimise=optimise)
        LLAMA.call(tuned)
        with ThinProducts(21) as count:
            LLAMA.call(tuned)
        products[optimise] = count.number
    assert products == {True: 2 * 4 + 1, False: 2 * 7 + 1}, "q, k and v; o; gate and up; down; and the head"


@ALL
def test_without_optimisation_every_bit_is_that_of_the_module_backend(peer: Peer):
    plain, modules = adapted(peer, optimise=False, dropout=0.1), adapted(peer, "modules", dropout=0.1)
    assert_same(*(trained(model.train(), peer.call) for model in (plain, modules)))
    assert all(program.fast is None for program in programs(plain))


def test_unknown_optimisations_are_an_error_that_lists_those_there_are():
    for wrong in (["stack", "fuse"], "stack"):
        with pytest.raises(ValueError, match="stack, recompute"):
            lora_fx.apply(zoo.Mlp(), zoo.rules(), optimise=wrong)


# -- adversarial blocks


class Attention(nn.Module):
    """A norm and four layers; what is done with them is said by subclasses."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def end(self, x: Tensor, q: Tensor, h: Tensor) -> Tensor:
        return x + self.o(q * self.k(h) + self.v(h))


def block(forward: Callable[[Any, Tensor], Any]) -> type[nn.Module]:
    return type(forward.__name__, (Attention,), {"forward": forward})


class Tower(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        beside = []
        for block in self.blocks:
            x = block(x)
            if isinstance(x, tuple):
                beside.append(x[1])
                x = x[0]
        return sum(beside, x)


def ordinary(self: Any, x: Tensor) -> Tensor:
    h = self.norm(x)
    return self.end(x, F.silu(self.q(h)), h)


def dropout_between_siblings(self: Any, x: Tensor) -> Tensor:
    h = self.norm(x)
    return self.end(x, F.dropout(self.q(h), 0.3, self.training), h)


def dropout_in_the_chain(self: Any, x: Tensor) -> Tensor:
    h = F.dropout(self.norm(x), 0.3, self.training)
    return self.end(x, F.gelu(self.q(h)), h)


def dropout_amid_the_chain(self: Any, x: Tensor) -> Tensor:
    return self.end(x, x, F.gelu(F.dropout(self.norm(x), 0.3, self.training)) * 2)


def sibling_changed_in_place(self: Any, x: Tensor) -> Tensor:
    h = self.norm(x)
    return self.end(x, F.relu(self.q(h), inplace=True), h)


def input_of_the_norm_changed_before(self: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 0] = 1.0
    return ordinary(self, x)


def norm_used_elsewhere(self: Any, x: Tensor) -> Any:
    h = self.norm(x)
    return self.end(x, self.q(h), h) + h, h * 2


def norm_returned(self: Any, x: Tensor) -> Any:
    h = self.norm(x)
    return self.end(x, self.q(h), h), h


def two_paths(self: Any, x: Tensor) -> Tensor:
    gate = self.q(x)
    return self.end(x, gate, F.silu(gate) * (gate.sigmoid() + x))


def sibling_unused(self: Any, x: Tensor) -> Tensor:
    h = self.norm(x)
    self.v(h)
    return x + self.o(self.q(h) + self.k(h))


def layer_called_twice(self: Any, x: Tensor) -> Tensor:
    h = self.norm(x)
    return self.end(x, self.q(h) + self.q(F.gelu(self.q(h))), h)


def sibling_of_a_cast(self: Any, x: Tensor) -> Tensor:
    h = self.norm(x).double().float()
    return self.end(x, self.q(h), h)


BLOCKS = (
    ordinary, dropout_between_siblings, dropout_in_the_chain, dropout_amid_the_chain, sibling_changed_in_place,
    input_of_the_norm_changed_before, norm_used_elsewhere, norm_returned, two_paths, sibling_unused,
    layer_called_twice, sibling_of_a_cast,
)  # fmt: skip
X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


def towers(
    forward: Callable[..., Any], rules: dict[str, Any] | None = None, **lora: Any
) -> tuple[nn.Module, nn.Module]:
    """Return a tower adapted with all passes, and by modules, in training with equal values."""
    torch.manual_seed(0)
    base, rules = Tower(block(forward)), rules or zoo.rules(r=4, **lora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = lora_fx.apply(base, rules, (X,)), lora_fx.apply(base, rules, backend="modules")
    for model in pair:
        zoo.randomise_(model)
    return pair[0].train(), pair[1].train()


def assert_agree(pair: tuple[nn.Module, nn.Module], call: Callable[[nn.Module], Tensor] = lambda m: m(X)) -> None:
    for again in (False, True):
        assert_equal_but_for_rounding(*(trained(model, call, again) for model in pair))
    with torch.no_grad():
        torch.testing.assert_close(*(model.eval()(X) for model in pair), rtol=1e-6, atol=1e-6)
    for model in pair:
        model.train()


@pytest.mark.parametrize("lora", [{}, {"dropout": 0.1}, pytest.param({"dora": True}, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("forward", BLOCKS, ids=lambda function: function.__name__)
@pytest.mark.sampled(2)
def test_block_computes_what_it_computes_by_modules_gradients_of_gradients_included(forward: Any, lora: dict[str, Any]):
    pair = towers(forward, **lora)
    assert_agree(pair)
    assert_agree(pair, lambda model: model(X[:1, :3]))
    assert fast_passes(pair[0]) >= {"recompute"} if forward is not input_of_the_norm_changed_before else {"stack"}


def input_changed_through_a_view(self: Any, x: Tensor) -> Tensor:
    h = self.norm(x).clone()
    row, q = h.view(-1), self.q(h)
    row += 1
    return self.end(x, q, h)


def input_changed_after_the_norm(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    h = self.norm(x)
    y = self.end(h, self.q(h), h)
    x.add_(1)
    return x + y


@pytest.mark.parametrize("forward", [input_changed_through_a_view, input_changed_after_the_norm])
def test_what_cannot_be_trained_without_graphs_cannot_with_them_and_runs_without_gradients(forward: Any):
    pair = towers(forward)
    with torch.no_grad():
        torch.testing.assert_close(*(model(X) for model in pair), rtol=1e-6, atol=1e-6)
    assert "recompute" not in fast_passes(pair[0])
    for tower in pair:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            trained(tower, lambda model: model(X.clone().requires_grad_()))


def test_siblings_of_other_ranks_dropouts_and_kinds():
    kinds = {"q": {"r": 2, "dropout": 0.1}, "v": {"r": 4, "dora": True}, "o": {"r": 3, "dropout": 0.5}}
    rules = {"version": 1, "rules": [{"match": {"name": f"**.{name}"}, "lora": lora} for name, lora in kinds.items()]}
    pair = towers(ordinary, rules)
    assert_agree(pair)
    assert fast_passes(pair[0]) == {"stack", "recompute"}


def test_siblings_of_which_some_are_frozen_or_of_another_dtype():
    for change in ("freeze A", "freeze B", "freeze q", "double"):
        pair = towers(ordinary, dropout=0.1)
        for model in pair:
            q = model.blocks[0].q
            factors = {"freeze A": [q.lora_A], "freeze B": [q.lora_B]}.get(change, [q.lora_A, q.lora_B])
            for factor in factors:
                factor.double() if change == "double" else factor.requires_grad_(False)
        assert_agree(pair)


def test_siblings_that_share_a_factor():
    pair = towers(ordinary)
    for model in pair:
        for inner in model.blocks:
            inner.k.lora_A["default"].weight = inner.q.lora_A["default"].weight
    assert_agree(pair)


def test_trained_norm_in_a_chain_gets_its_gradients():
    rules = zoo.rules(r=4, train=["blocks.*.norm"])
    pair = towers(ordinary, rules)
    assert pair[0].blocks[0].norm.weight.requires_grad
    assert_agree(pair)
    assert fast_passes(pair[0]) == {"stack", "recompute"}


def test_hooks_inside_fire_once_a_call():
    for path in ("blocks.0.norm", "blocks.0.q", "blocks.0.q.lora_A.default", "blocks.1"):
        tuned, modules = towers(ordinary)
        seen: list[str] = []
        tuned.get_submodule(path).register_forward_hook(lambda *_, path=path, seen=seen: seen.append(path))
        for number in (1, 2, 3):
            assert_equal_but_for_rounding(trained(tuned, lambda m: m(X)), trained(modules, lambda m: m(X)))
            assert seen == [path] * number
        tuned.double()(X.double()).sum().backward()
        assert seen == [path] * 4


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_blocks_under_checkpoints(reentrant: bool):
    for forward in (ordinary, dropout_between_siblings):
        pair = towers(forward, dropout=0.1)
        for model in pair:
            model.zero_grad()
            torch.manual_seed(5)
            x = X.clone().requires_grad_()
            for block in model.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            x.square().mean().backward()
        gradients, expected = ([None, *(p.grad for p in lora_fx.parameters(model))] for model in pair)
        assert_equal_but_for_rounding(gradients, expected)


def test_blocks_under_autocast():
    pair = towers(ordinary, dropout=0.1)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            runs = [trained(tower, lambda model: model(X)) for tower in pair]
        assert_equal_but_for_rounding(*runs, values=0.02, slopes=0.05)


def test_blocks_under_transformations_of_torch_func():
    tuned, modules = towers(ordinary)

    def slopes(model: nn.Module) -> dict[str, Tensor]:
        values = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}

        def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(model, values, (x,)).square().mean()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(values, X)

    gradients, expected = slopes(tuned), slopes(modules)
    assert_equal_but_for_rounding([None, *gradients.values()], [None, *expected.values()])
