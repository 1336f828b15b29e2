"""Real architectures in tiny, with random weights: what adapted models are compared on, and how."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import transformers
from diffusers import DiTTransformer2DModel, UNet2DConditionModel

import lora_fx
from tests.support.zoo import randomise_, rules

VOCABULARY = 64
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Relative and absolute: a few roundings of values of order one; 2 · 2⁻⁸ in bfloat16, 2 · 2⁻¹¹ in float16."""


@dataclass(frozen=True)
class Peer:
    """A real architecture and how to call it."""

    name: str
    make: Callable[..., nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    block: str
    """Path of a block that becomes a region."""
    inner: str
    """Path, in the block, of a module that holds adapted linears."""

    def build(self, **config: Any) -> nn.Module:
        """Return the model, always with the same random weights, in eval mode."""
        torch.manual_seed(0)
        return self.make(**config).eval()

    def call(self, model: nn.Module, batch: int = 3, length: int = 7, dtype: torch.dtype | None = None) -> Tensor:
        """Return the first result of a call with inputs of that size."""
        given = self.inputs(batch, length)
        if dtype is not None:
            given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
        return model(**given)[0]


def _generator(batch: int, length: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 * batch + length)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=_generator(batch, length))


def padded(batch: int, length: int, side: str = "right") -> Tensor:
    """Return a padding mask: the last row is shorter by up to two tokens, if there are several rows."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if batch > 1 and length > 2:
        mask[-1, slice(-2, None) if side == "right" else slice(0, 2)] = 0
    return mask


def _text(batch: int, length: int) -> dict[str, Any]:
    return {"input_ids": tokens(batch, length), "attention_mask": padded(batch, length)}


def _text_to_text(batch: int, length: int) -> dict[str, Any]:
    return {**_text(batch, length), "decoder_input_ids": tokens(batch, length + 1)}


def _pictures(batch: int, length: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=_generator(batch, length))}


def _latents(batch: int, length: int) -> dict[str, Any]:
    latents = torch.randn(batch, 4, 8, 8, generator=_generator(batch, length))
    return {"hidden_states": latents, "timestep": torch.arange(batch) + length, "class_labels": torch.arange(batch)}


def _conditioned_latents(batch: int, length: int) -> dict[str, Any]:
    generator = _generator(batch, length)
    latents, text = (
        torch.randn(batch, 4, 8, 8, generator=generator),
        torch.randn(batch, length, 24, generator=generator),
    )
    return {"sample": latents, "timestep": torch.arange(batch) + length, "encoder_hidden_states": text}


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_WORDS = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}


def llama(**config: Any) -> nn.Module:
    settings = {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **config}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES | _WORDS | settings))


def bert(**config: Any) -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**_SIZES | _WORDS | {"num_labels": 5} | config)
    )


def t5(**config: Any) -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    words = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **words, **config))


def vit(**config: Any) -> nn.Module:
    settings = {"image_size": 16, "patch_size": 4, "num_labels": 5, "hidden_dropout_prob": 0.1, **config}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**_SIZES | settings))


def dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, dropout=0.1,
    )  # fmt: skip


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16,), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        cross_attention_dim=24, attention_head_dim=8,
    )  # fmt: skip


LLAMA = Peer("llama", llama, _text, "model.layers.0", "mlp")
BERT = Peer("bert", bert, _text, "bert.encoder.layer.0", "attention.self")
T5 = Peer("t5", t5, _text_to_text, "decoder.block.0", "layer.1.EncDecAttention")
VIT = Peer("vit", vit, _pictures, "vit.layers.0", "mlp")
DIT = Peer("dit", dit, _latents, "transformer_blocks.0", "attn1")
UNET = Peer("unet", unet, _conditioned_latents, "down_blocks.0", "attentions.0")

TRANSFORMERS = (LLAMA, BERT, T5, VIT)
PEERS = (*TRANSFORMERS, DIT, UNET)
QUICK = (LLAMA, BERT, VIT, DIT)
LARGE = (T5, UNET)
"""Those of `PEERS` with many kinds of blocks, each of which takes its time to capture."""


def each(peers: tuple[Peer, ...], slow: tuple[Peer, ...] = (), fuzz: tuple[Peer, ...] = ()) -> pytest.MarkDecorator:
    """Run a test once for each peer; for those in `slow` only where slow tests run, for those in `fuzz` where all do."""
    marked = [pytest.param(peer, marks=pytest.mark.slow) for peer in slow]
    marked += [pytest.param(peer, marks=pytest.mark.fuzz) for peer in fuzz]
    return pytest.mark.parametrize("peer", [*peers, *marked], ids=lambda peer: peer.name)


@functools.cache
def _plan(peer: Peer, dropout: float, config: tuple[tuple[str, Any], ...]) -> lora_fx.Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model, about the sample
        return lora_fx.plan(peer.build(**dict(config)), rules(r=2, dropout=dropout), peer.inputs(2, 6))


def _applied(peer: Peer, dropout: float, config: tuple[tuple[str, Any], ...], optimise: bool) -> nn.Module:
    return lora_fx.apply(peer.build(**dict(config)), _plan(peer, dropout, config), optimise=optimise)


_kept = functools.cache(_applied)


@functools.cache
def _kept_modules(peer: Peer, dropout: float, config: tuple[tuple[str, Any], ...]) -> nn.Module:
    return lora_fx.apply(peer.build(**dict(config)), rules(r=2, dropout=dropout), backend="modules")


def adapted(
    peer: Peer,
    backend: str = "auto",
    random: bool = True,
    dropout: float = 0.0,
    fresh: bool = False,
    optimise: bool = True,
    **config: Any,
) -> nn.Module:
    """Return an adapted model, always with the same values; B is zero unless `random`.

    It is a copy of one that is kept, and knows the graphs that others have learnt; `fresh`, only those of `apply`.
    """
    options = (dropout, tuple(config.items()), optimise)
    if backend == "modules":
        tuned = copy.deepcopy(_kept_modules(peer, dropout, tuple(config.items())))
    else:
        tuned = _applied(peer, *options) if fresh else copy.deepcopy(_kept(peer, *options))
    if random:
        randomise_(tuned)
    return tuned


def pair(peer: Peer, fresh: bool = False, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Return the model adapted by graphs and by modules, with equal values."""
    return adapted(peer, fresh=fresh, **options), adapted(peer, "modules", **options)


def frozen(peer: Peer, **config: Any) -> nn.Module:
    """Return the base as adapted models hold it: torch folds matmuls otherwise where a weight is trained."""
    return peer.build(**config).requires_grad_(False)


def tensors(value: Any) -> list[Tensor]:
    """Return every tensor in a result, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def assert_same(one: Any, other: Any) -> None:
    """Assert that two results hold the same tensors, bit by bit."""
    ones, others = tensors(one), tensors(other)
    assert [(t.shape, t.dtype) for t in ones] == [(t.shape, t.dtype) for t in others]
    assert ones, "no tensor to compare"
    for index, (a, b) in enumerate(zip(ones, others, strict=True)):
        assert torch.equal(a, b), f"tensor {index} of {len(ones)} differs by {(a - b).abs().max()}"


def assert_close(one: Any, other: Any) -> None:
    """Assert that two results hold tensors that are equal within the tolerance of their dtype."""
    ones, others = tensors(one), tensors(other)
    assert len(ones) == len(others)
    assert ones, "no tensor to compare"
    for a, b in zip(ones, others, strict=True):
        tolerance = TOLERANCES[a.dtype] if a.is_floating_point() else 0.0
        scale = max(1.0, float(b.detach().abs().max())) if tolerance else 0.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


def gradients(tuned: nn.Module, result: Tensor) -> list[Tensor]:
    """Return the gradients of all adapter parameters for a loss on the result; all of them have one."""
    tuned.zero_grad()
    result.float().square().mean().backward()
    gradients = [parameter.grad for parameter in lora_fx.parameters(tuned)]
    assert all(gradient is not None for gradient in gradients)
    return [gradient.clone() for gradient in gradients if gradient is not None]


def counts(tuned: nn.Module) -> tuple[int, int]:
    """Return hits and misses of all regions since the model was adapted."""
    regions = lora_fx.inspect(tuned).regions
    return sum(region.hits for region in regions), sum(sum(region.misses.values()) for region in regions)
