"""What a process really allocates in a step: bytes of local storages, as they are after each operator."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

import lora_fx
from lora_fx.bench.counters import FORMULAS

RULES = {
    "version": 1,
    "rules": [{"name": "all", "match": {"name": "**.{q,k,v,o,gate,up,down}_proj"}, "lora": {"r": 4, "alpha": 8}}],
}

PARTS = 3
"""Micro-batches of a pipeline's step."""


def llama(**more: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "attn_implementation": "sdpa", **more}))


def inputs() -> dict[str, Any]:
    ids = torch.randint(0, 256, (2, 96), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def adapted() -> nn.Module:
    return lora_fx.apply(llama(), RULES, backend="modules").train()


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    tensor = tensor.detach()
    tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return getattr(tensor, "elem", tensor)  # of a collective that may not be done yet


def bytes_of(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    held = {part.untyped_storage()._cdata: part.untyped_storage().nbytes() for part in map(local, tensors)}
    return sum(held.values())


class Meter(TorchDispatchMode):
    """The bytes of all storages that were made since, as they are after each operator; FLOPs of what is local."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.flops = 0
        self._made: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {part.untyped_storage()._cdata for part in _parts((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            args, kwargs, out = pytree.tree_map_only(Tensor, local, (args, kwargs or {}, result))
            self.flops += formula(*args, **kwargs, out_val=out)
        for part in _parts(result):
            storage = part.untyped_storage()
            if storage._cdata not in before:
                self._made.setdefault(storage._cdata, weakref.ref(storage))
                weakref.finalize(storage, self._made.pop, storage._cdata, None)
        self.peak = max(self.peak, self.live())
        return result

    def live(self, but: list[Tensor] | None = None) -> int:
        """Return the bytes that are live now, without those of some tensors."""
        left_out = {local(tensor).untyped_storage()._cdata for tensor in but or ()}
        storages = [storage() for key, storage in list(self._made.items()) if key not in left_out]
        return sum(storage.nbytes() for storage in storages if storage is not None)


def _parts(value: Any) -> list[Tensor]:
    return [local(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def metered(tuned: nn.Module, step: Callable[[nn.Module, Meter], int]) -> dict[str, int]:
    """Return what a process has and makes in two steps of training; the second is measured."""
    trained = list(lora_fx.parameters(tuned))
    optimizer, meter = torch.optim.AdamW(trained, lr=1e-3, foreach=False), Meter()
    step(tuned, meter)  # knows the memory into which parameters are gathered, which is given back in between
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    found = {"optimizer": bytes_of(states), "gradients": bytes_of([p.grad for p in trained])}
    optimizer.zero_grad()
    tuned.reshard() if hasattr(tuned, "reshard") else None
    ids = {id(parameter) for parameter in trained}
    frozen = [parameter for parameter in tuned.parameters() if id(parameter) not in ids]
    found |= {"weights": bytes_of([*frozen, *tuned.buffers()]), "adapters": bytes_of(trained)}
    meter.peak = meter.flops = 0
    found["kept"] = step(tuned, meter)
    return found | {"peak": meter.peak, "flops": meter.flops}


def stepped(tuned: nn.Module, meter: Meter) -> int:
    """Run both passes; return the bytes that live between them."""
    with meter:
        loss = tuned(**inputs()).loss
        kept = meter.live(but=list(tuned.parameters()))
        loss.backward()
    return kept


class Stage(nn.Module):
    """One of two stages of a Llama."""

    def __init__(self, tuned: Any, number: int) -> None:
        super().__init__()
        half = len(tuned.model.layers) // 2
        self.layers = tuned.model.layers[number * half : (number + 1) * half]
        self.rotary = tuned.model.rotary_emb
        self.embed = tuned.model.embed_tokens if number == 0 else None
        self.norm, self.head = (tuned.model.norm, tuned.lm_head) if number else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        positions = torch.arange(x.shape[1])[None]
        turns = self.rotary(x, positions)
        for layer in self.layers:
            x = layer(x, position_ids=positions, position_embeddings=turns)
        return x if self.head is None else self.head(self.norm(x))


def piped(mesh: Any) -> Callable[[nn.Module, Meter], int]:
    """Return a step of 1F1B; what is kept is seen when a stage first goes backwards, which is when it has most."""
    schedules: list[tuple[Schedule1F1B, list[int]]] = []

    def step(stage: nn.Module, meter: Meter) -> int:
        if not schedules:
            ends = PipelineStage(stage, mesh.get_local_rank(), 2, torch.device("cpu"), group=mesh.get_group())
            kept: list[int] = []
            backward = ends.backward_one_chunk

            def watched(*args: Any, **kwargs: Any) -> None:
                kept.append(meter.live(but=list(stage.parameters())))
                backward(*args, **kwargs)

            ends.backward_one_chunk = watched
            schedules.append((Schedule1F1B(ends, PARTS, loss_fn=_loss), kept))
        schedule, kept = schedules[0]
        kept.clear()
        ids = inputs()["input_ids"].repeat(PARTS, 1)
        with meter:
            schedule.step(
                *(() if mesh.get_local_rank() else (ids,)),
                target=ids if mesh.get_local_rank() else None,
                return_outputs=False,
            )
        return kept[0]

    return step


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1])


def sharded(tuned: nn.Module, mesh: Any) -> nn.Module:
    for block in tuned.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(tuned, mesh=mesh)


def parallel(tuned: nn.Module, mesh: Any) -> nn.Module:
    """Make a model tensor parallel by the plan that transformers brings with it."""
    gathered = ColwiseParallel(output_layouts=Replicate())
    styles = {"colwise": ColwiseParallel(), "rowwise": RowwiseParallel(), "colwise_gather_output": gathered}
    styles["embedding_rowwise"] = RowwiseParallel(input_layouts=Replicate())
    plan = {name: styles[style] for name, style in tuned._tp_plan.items()}
    return parallelize_module(tuned, mesh, plan)


def by_four(_folder: Path) -> dict[str, dict[str, int]]:
    """What a process of four, two by two, has and makes of a model; plain and checkpointed."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("first", "tp"))
    first, tp = mesh["first"], mesh["tp"]
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        "dp=2,tp=2": lambda tuned: sharded(parallel(tuned, tp), first),
        "tp=2,pp=2": lambda tuned: Stage(parallel(tuned, tp), first.get_local_rank()),
    }
    return measured(ways, {"tp=2,pp=2": lambda: piped(first)})


Step = Callable[[nn.Module, Meter], int]


def measured(
    ways: dict[str, Callable[[nn.Module], nn.Module]], steps: dict[str, Callable[[], Step]]
) -> dict[str, dict[str, int]]:
    """Return what this process has and makes of a model that is shared in some ways; plain and checkpointed."""
    found = {}
    for name, way in ways.items():
        for more in ("", " checkpointed"):
            tuned: Any = adapted()
            if more:
                tuned.gradient_checkpointing_enable({"use_reentrant": False})
                tuned.disable_input_require_grads()  # for blocks that reenter; it would keep what is not yet reduced
            found[name + more] = metered(way(tuned).train(), steps.get(name, lambda: stepped)())
    return found


def by_two(_folder: Path) -> dict[str, dict[str, int]]:
    """What a process of two has and makes of a model; plain and checkpointed."""
    mesh = init_device_mesh("cpu", (2,))
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        "dp=2": lambda tuned: sharded(tuned, mesh),
        "tp=2": lambda tuned: parallel(tuned, mesh),
        "ddp": lambda tuned: DistributedDataParallel(tuned, gradient_as_bucket_view=True),
    }
    return measured(ways, {})


def by_all(_folder: Path) -> dict[str, dict[str, int]]:
    """What a process has and makes of a model that all shard; one alone has it whole."""
    number = dist.get_world_size()
    mesh = init_device_mesh("cpu", (number,))
    return measured({"all": lambda tuned: sharded(tuned, mesh) if number > 1 else tuned}, {})


def at_most(found: dict[str, int]) -> int:
    """Return the most bytes at once of a process; gradients are among what the passes make."""
    return found["weights"] + found["adapters"] + found["optimizer"] + found["peak"]
