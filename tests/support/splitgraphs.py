"""Work for two processes that share the layers of blocks, which run as graphs; beside one process, and without graphs."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lora_fx
from lora_fx.capture.captured import NotCaptured
from lora_fx.models.torch_internals import DispatchMode, pytree
from lora_fx.regions import splitblock
from lora_fx.regions.region import region_of
from lora_fx.regions.splitblock import SplitBlock
from tests.support.parallel import LAYERS, parallel, rules
from tests.support.sharded import Block, Tokens, adapted, alike, rule, tokens, values_of, whole
from tests.support.tpplans import train

STYLES: dict[str, Any] = {
    "layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
    "layers.*.self_attn.o_proj": RowwiseParallel(),
    "layers.*.mlp.gate_proj": ColwiseParallel(),
    "layers.*.mlp.up_proj": ColwiseParallel(),
    "layers.*.mlp.down_proj": RowwiseParallel(),
}
"""Of a Llama's blocks, as Megatron splits them."""


# -- what is counted


def kept(model: nn.Module, x: dict[str, Tensor]) -> int:
    """Return the bytes that autograd keeps of a forward pass in this process, every storage once, without weights."""
    own = {_storage(p.detach())._cdata for p in model.parameters()}
    found: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage._cdata not in own:
            found[storage._cdata] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**x)
    return sum(size for _, size in found.values())


def _storage(tensor: Any) -> Any:
    with torch.no_grad():
        return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage()


class Sums(DispatchMode):
    """Counts what processes add up, and the bytes of that."""

    def __init__(self) -> None:
        super().__init__()
        self.number = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # what it does with its parts comes here
        if "all_reduce" in str(func) or "allreduce" in str(func):
            self.number += 1
            self.bytes += sum(leaf.nbytes for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


# -- what the processes do


def split(folder: Path) -> dict[str, Any]:
    return {
        "llama": _llama(),
        "checkpointed": _llama(checkpointed=True),
        "without graphs": _llama("modules"),
        "ways": _ways(),
        "hooked": _hooked(),
        "parted": _parted(),
        "one of them": {name: _one_of_them(change) for name, change in CHANGES.items()},
        "replaced": {name: _replaced(change) for name, change in REPLACED.items()},
        "for a while": {name: _for_a_while(*both) for name, both in HINDERED.items()},
        "let go": _let_go(),
        "otherwise": _otherwise() | {"asked": _asked()},
    }


def llama(backend: str, checkpointed: bool = False) -> Any:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 48, "vocab_size": 33, "num_hidden_layers": 2}
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, mlp_bias=True)
    model = transformers.LlamaForCausalLM(config)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    example = {"input_ids": tokens(), "labels": tokens()}
    return lora_fx.apply(model, rules(rule("**.layers.*.**", init="random")), example, backend=backend).train()


def _llama(backend: str = "auto", checkpointed: bool = False) -> dict[str, Any]:
    """Train fifty steps beside one process; count what is kept and added up; generate with a cache."""
    tuned, same = llama(backend, checkpointed), llama("modules")
    alike(same, values_of(tuned))
    parallelize_module(
        tuned, init_device_mesh("cpu", (dist.get_world_size(),)), {f"model.{path}": one for path, one in STYLES.items()}
    )
    losses = [train(model, steps=50) for model in (tuned, same)]
    hits, misses = _counted(tuned)
    with Sums() as sums:
        tuned(input_ids=tokens(), labels=tokens()).loss.backward()
    grads = [
        (whole(p.grad), whole(q.grad))
        for p, q in zip(*map(lora_fx.parameters, (tuned, copy.deepcopy(tuned))), strict=True)
    ]
    bytes_kept = kept(tuned, {"input_ids": tokens()})
    alike(same, values_of(tuned))
    tokens_of = [m.eval().generate(tokens(), max_new_tokens=4, do_sample=False) for m in (tuned, same)]
    found = {"hits": hits, "misses": misses, "sums": sums.number, "kept": bytes_kept, "generated": tokens_of}
    found["copied"] = grads
    return found | {"losses": losses, "report": str(lora_fx.inspect(tuned))}


def _counted(tuned: nn.Module) -> tuple[list[int], list[dict[str, int]]]:
    blocks = [region for region in lora_fx.inspect(tuned).regions if "." in region.path]
    return [region.hits for region in blocks], [region.misses for region in blocks]


def _two() -> tuple[Any, Any]:
    """Return a model whose blocks are split, and the same whole."""
    those = rules(rule(LAYERS))
    return parallel(adapted(those)), adapted(those, backend="modules")


def _ways() -> dict[str, Any]:
    """Outputs under autocast, with other adapters, with none, at other sizes, of a copy; each beside the whole model's."""
    tuned, same = _two()
    for model in (tuned, same):
        torch.manual_seed(5)
        lora_fx.add(model, rules(rule("blocks.*.{up,v}", init="random")), adapter="b")
    alike(same, values_of(tuned))
    found: dict[str, Any] = {}
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = tuned(tokens()).detach(), same(tokens()).detach()
    for name, chosen in (("both", ["default", "b"]), ("weighted", {"default": 0.5, "b": 2}), ("none", None)):
        with lora_fx.use(tuned, chosen), lora_fx.use(same, chosen):
            found[name] = tuned(tokens()).detach(), same(tokens()).detach()
    found["other sizes"] = tuned(tokens()[:1, :3]).detach(), same(tokens()[:1, :3]).detach()
    with torch.no_grad():
        found["no gradients"] = tuned(tokens()), same(tokens())
    return {"outputs": found, "counted": _counted(tuned)}


def _hooked() -> dict[str, Any]:
    """A hook of the user's on a split layer, which a graph would not call; then without it again."""
    tuned, same = _two()
    tuned(tokens())
    handles = [m.blocks[0].up.register_forward_hook(lambda _m, _x, y: y * 2) for m in (tuned, same)]
    outputs = [(tuned(tokens()).detach(), same(tokens()).detach())]
    hits, _ = _counted(tuned)
    for handle in handles:
        handle.remove()
    outputs.append((tuned(tokens()).detach(), same(tokens()).detach()))
    return {"outputs": outputs, "hits": (hits, _counted(tuned)[0]), "report": str(lora_fx.inspect(tuned))}


def _parted() -> dict[str, Any]:
    """One process alone finds no graph: none of them runs one."""
    tuned, same = _two()
    found = SplitBlock._found

    def fails(self: SplitBlock, replay: Any) -> int:
        raise NotCaptured("here something is different")

    if dist.get_rank() == 1:
        SplitBlock._found = fails  # type: ignore[method-assign]
    try:
        outputs = [(tuned(tokens()).detach(), same(tokens()).detach()) for _ in range(2)]
    finally:
        SplitBlock._found = found  # type: ignore[method-assign]
    return {"outputs": outputs, "counted": _counted(tuned)}


CHANGES: dict[str, Any] = {
    "hook on a split layer": lambda block: block.up.register_forward_hook(lambda *_: None),
    "hook on a whole layer": lambda block: block.norm.register_forward_hook(lambda *_: None),
    "hook on a factor": lambda block: block.up.lora_A["default"].register_forward_hook(lambda *_: None),
    "backward hook": lambda block: block.up.register_full_backward_hook(lambda *_: None),
    "attribute": lambda block: setattr(block.norm, "forward", block.norm.forward),
    "forward around a split layer": lambda block: setattr(block.up, "forward", functools.partial(block.up.forward)),
}
"""What the first process alone does to a block."""


def _one_of_them(change: Any) -> dict[str, Any]:
    """What one process alone does to a block, before the first graph and after: (outputs, gradients), hits, misses."""
    found = {}
    for when in ("before", "after"):
        tuned, same = _two()
        if when == "after":
            tuned(tokens())
        if dist.get_rank() == 0:
            change(tuned.blocks[0])
        pairs = []
        for _ in range(2):
            outputs = [model(tokens()) for model in (tuned, same)]
            pairs.append(tuple(output.detach() for output in outputs))
            for output in outputs:
                output.square().mean().backward()
        both = zip(lora_fx.parameters(tuned), lora_fx.parameters(same), strict=True)
        pairs += [(whole(p.grad), q.grad) for p, q in both if q.grad is not None]
        found[when] = pairs, _counted(tuned)
    return found


def _twice(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach() * 2, requires_grad=False)


def _norm(block: nn.Module) -> None:
    block.norm = nn.LayerNorm(16)
    nn.init.constant_(block.norm.weight, 2)


REPLACED: dict[str, Any] = {
    "nothing": lambda block: None,
    "values": lambda block: block.up.weight.detach().mul_(2),
    "weight": lambda block: setattr(block.down, "weight", _twice(block.down.weight)),
    "all of a layer in its place": lambda block: block.up._apply(lambda tensor: tensor * 2),
    "bias of a split layer": lambda block: setattr(block.down, "bias", _twice(block.down.bias)),
    "whole layer": _norm,
    "frozen factor": lambda block: block.up.lora_A["default"].weight.requires_grad_(False),
    "trained bias": lambda block: block.down.bias.requires_grad_(True),
    "attribute": lambda block: setattr(block, "note", 3),
}
"""What all processes do to a block of which they keep a stand-in."""


def _replaced(change: Any) -> dict[str, Any]:
    """Return outputs and gradients beside those of the whole model, and whether a stand-in was kept: before, after."""
    tuned, same = _two()
    split = [_step(tuned, same) or region_of(tuned.blocks[0]).split for _ in range(2)][-1]
    first = [*split.kept.values()]
    _step(tuned, same)
    second = [*split.kept.values()]
    for model in (tuned, same):
        change(model.blocks[0])
        model.zero_grad()
    output = tuned(tokens()), same(tokens())
    third = [*split.kept.values()]
    _step(tuned, same)
    both = zip(tuned.parameters(), same.parameters(), strict=True)
    grads = [(whole(p.grad), q.grad) for p, q in both if q.grad is not None]
    return {"pairs": [output, *grads], "kept": (first == second, second == third)}


def _dora(tuned: nn.Module) -> None:
    lora_fx.add(tuned, rules(rule("blocks.0.up", dora=True)), adapter="d")


HINDERED: dict[str, Any] = {
    "an adapter of DoRA": (_dora, lambda tuned: lora_fx.drop(tuned, "d")),
    "a trained bias": (
        lambda tuned: tuned.blocks[0].down.bias.requires_grad_(True),
        lambda tuned: tuned.blocks[0].down.bias.requires_grad_(False),
    ),
}
"""What keeps a block from having a graph in all processes, and what ends it."""


def _for_a_while(begin: Any, end: Any) -> dict[str, Any]:
    """Return outputs beside those of the whole model, and the hits of the first block: before, while, after."""
    tuned, same = _two()
    rests, splitblock.RESTS = splitblock.RESTS, 2
    pairs, hits = [], []
    for change in (lambda _: None, begin, end):
        for model in (tuned, same):
            torch.manual_seed(7)
            change(model)
        pairs += [(tuned(tokens()).detach(), same(tokens()).detach()) for _ in range(5)]
        hits.append(_counted(tuned)[0][0])
    splitblock.RESTS = rests
    return {"pairs": pairs, "hits": hits}


def _let_go() -> bool:
    """Whether the weights that a block had are gone though it was called in another mode with them."""
    tuned, _ = _two()
    with torch.no_grad():
        tuned(tokens())
    tuned(tokens())
    held = weakref.ref(tuned.blocks[0].up._parameters["weight"]._local_tensor)
    tuned.double()
    tuned(tokens())
    gc.collect()
    return held() is None


def _step(*models: nn.Module) -> None:
    for model in models:
        model(tokens()).square().mean().backward()


def _otherwise() -> dict[str, Any]:
    """What no graph is made for: (output, that of the whole model, hits, misses of the first block)."""
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "gathered": ({}, {"blocks.*.q": ColwiseParallel(output_layouts=Replicate()), "blocks.*.v": ColwiseParallel(
            output_layouts=Replicate())}),
        "dora": ({"dora": True}, {}),
        "bias": ({"bias": True}, {}),
    }  # fmt: skip
    found = {}
    for name, (lora, styles) in kinds.items():
        tuned = parallel(adapted(rules(rule(LAYERS, **lora))), **styles)
        same = adapted(rules(rule(LAYERS, **lora)), backend="modules")
        outputs = tuned(tokens()).detach(), same(tokens()).detach()
        hits, misses = _counted(tuned)
        found[name] = (*outputs, hits[0], list(misses[0]))
    return found


class Asks(Block):
    """Its scale is that of the whole layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.up.bias.shape[0] ** -0.5


def _asked() -> tuple[Any, ...]:
    """Return what `_otherwise` does, of blocks that ask a split layer for its shape."""

    def make() -> Any:
        torch.manual_seed(3)
        model = Tokens()
        model.blocks = nn.ModuleList(Asks(16) for _ in range(2))
        return lora_fx.apply(model, rules(rule(LAYERS)), (tokens(),))

    tuned, same = make(), make()
    alike(same, values_of(parallel(tuned)))
    outputs = tuned(tokens()).detach(), same(tokens()).detach()
    hits, misses = _counted(tuned)
    return (*outputs, hits[0], list(misses[0]))
