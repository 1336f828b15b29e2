"""Work for several processes: adapted models that torch makes tensor parallel, and the same ones whole beside them."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import lora_fx
from tests.support.pipelined import pipelined
from tests.support.sharded import SLICED, Tokens, adapted, alike, base, files, refusal, rule, tokens, values_of, whole

LAYERS = "blocks.*.{q,v,up,down}"


def rules(*those: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"version": 1, "rules": list(those), **more}


PLAIN = rules(rule(LAYERS), rule("{embed,head}"))
"""33 outputs of the head do not divide by 2."""
KINDS = {
    "plain": PLAIN,
    "dora": rules(rule(LAYERS, dora=True, bias=True)),
    "started": rules(rule("blocks.*.{q,v}", init="pissa"), rule("blocks.0.up", lora_fa=True), train=["head", "norm"]),
}


def styles(**more: Any) -> dict[str, Any]:
    mlp = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
    ends = {"embed": ColwiseParallel(output_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Replicate())}
    return {"blocks.*.q": ColwiseParallel(), "blocks.*.v": RowwiseParallel(), **mlp, **ends, **more}


def parallel(model: Any, **more: Any) -> Any:
    """Make a model tensor parallel, in place, over all processes."""
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), styles(**more))


def train(model: nn.Module, steps: int = 4, clips: bool = False) -> list[float]:
    """Train on the same data in every process; return the losses.

    torch clips no DTensors and plain tensors together.
    """
    parameters, losses = list(lora_fx.parameters(model)), []
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(steps):
        loss = model(tokens(step)).float().square().mean()
        loss.backward()
        if clips:
            nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def treated(folder: Path) -> dict[str, Any]:
    """Everything that is done to tensor parallel models, beside the same models whole."""
    found = {kind: _both(KINDS[kind], folder / kind) for kind in KINDS}
    found |= _several(folder / "several") | {"others": _others(), "refused": _refused()}
    found |= {"pipelined": pipelined(folder / "pipelined"), "after": _after(folder / "after")}
    if importlib.util.find_spec("bitsandbytes") is not None:
        from tests.support.packedshards import packed

        found["packed"] = packed(folder / "packed")
    return found


def _both(those: dict[str, Any], folder: Path) -> dict[str, Any]:
    tuned = parallel(adapted(those, backend="auto" if those is PLAIN else "modules"))
    same, clips = adapted(those, backend="modules"), those is PLAIN
    steps = 50 if those is PLAIN else 4
    losses = {"losses": train(tuned, steps, clips), "losses of one": train(same, steps, clips)}
    return losses | read_off(tuned, same, folder)


def read_off(tuned: nn.Module, same: nn.Module, folder: Path) -> dict[str, Any]:
    """Return what is read from a tensor parallel model, and from one with its values that is whole."""
    before = values_of(tuned)
    same = alike(same, before)
    lora_fx.save(tuned, folder / "parallel")
    if dist.get_rank() == 0:
        lora_fx.save(same, folder / "whole")
    dist.barrier()
    merged, removed, of_one = lora_fx.merge(tuned), lora_fx.remove(tuned), lora_fx.merge(same)
    with torch.no_grad(), lora_fx.disabled(tuned):
        result: dict[str, Any] = {"output of base": (tuned(tokens()), base()(tokens()))}
    with torch.no_grad():
        result |= {
            "output": (tuned(tokens()), same(tokens())),
            "output of copy": (copy.deepcopy(tuned)(tokens()), same(tokens())),
            "output of merged": (merged(tokens()), of_one(tokens())),
            "output of removed": (removed(tokens()), base()(tokens())),
        }
    return result | {
        "files": (files(folder / "parallel"), files(folder / "whole")),
        "merged": (values_of(merged), values_of(of_one)),
        "removed": (values_of(removed), base().state_dict()),
        "placed": {name: p.placements for name, p in tuned.named_parameters() if hasattr(p, "placements")},
        "placed merged": {name: p.placements for name, p in merged.named_parameters() if hasattr(p, "placements")},
        "hits": {region.path: region.hits for region in lora_fx.inspect(tuned).regions},
        "unchanged": (before, values_of(tuned)),
    }


def _after(folder: Path) -> dict[str, Any]:
    """A model that is tensor parallel already is adapted, and an adapter loaded into it; beside one that is whole."""
    model = parallel(base())
    torch.manual_seed(dist.get_rank())  # each process draws otherwise
    those = rules(rule(LAYERS), rule("head", init="pissa"), rule("embed", dora=True, adapter="b"), train=["norm"])
    tuned = lora_fx.apply(model, those, (tokens(),))
    first = values_of(tuned)
    same = alike(adapted(those, backend="modules"), first)
    losses = {"losses": train(tuned), "losses of one": train(same)}
    result = read_off(tuned, same, folder)
    loaded = lora_fx.load(model, folder / "parallel", (tokens(),))
    lora_fx.use(loaded, ["default", "b"])
    with torch.no_grad():
        result["output of loaded"] = (loaded(tokens()), tuned(tokens()))
    return (
        losses
        | result
        | {
            "first": first,
            "loaded": (values_of(loaded), values_of(tuned)),
            "base": (values_of(model), base().state_dict()),
            "slices": refusal(lambda: lora_fx.apply(model, SLICED)),
        }
    )


def both_adapters(backend: str = "modules") -> nn.Module:
    tuned = adapted(rules(rule("blocks.*.{q,up}")), backend=backend)
    torch.manual_seed(5)
    lora_fx.add(tuned, rules(rule("blocks.*.{up,down}", init="random")), adapter="b")
    return tuned


def _several(folder: Path) -> dict[str, Any]:
    tuned, same = parallel(both_adapters("auto")), both_adapters()
    for model in (tuned, same):
        lora_fx.use(model, {"default": 0.5, "b": 2})
    result = read_off(tuned, same, folder)
    result["rows"] = refusal(lambda: _rows(tuned))
    held = [*lora_fx.parameters(tuned)]
    for model, seed in ((tuned, 7 + dist.get_rank()), (same, 7)):  # the values of the first process are taken
        torch.manual_seed(seed)
        grow(model, folder)
    grown = {"grown": (values_of(tuned), values_of(same)), "kept": _are_in(held, tuned)}
    grown |= {"losses": train(tuned), "losses of one": train(same)}
    trained = values_of(tuned)
    lora_fx.load_adapter_state(same, {name: trained[name] for name in lora_fx.adapter_state(same)})
    lora_fx.load_adapter_state(tuned, lora_fx.adapter_state(same))
    grown["state"] = values_of(tuned), trained
    clashing = rules(rule("blocks.*.q"), {**rule("blocks.*.up"), "slices": {"of": ["a", "b", "c"], "adapt": ["a"]}})
    grown["slices"] = refusal(lambda: lora_fx.add(tuned, clashing, adapter="x"))
    return {"several": result, "grown": grown | read_off(tuned, same, folder / "grown")}


def grow(model: nn.Module, folder: Path) -> None:
    """Add, combine, swap, drop and rename adapters in place."""
    lora_fx.add(
        model,
        rules(rule("blocks.*.v", init="pissa"), rule("head", init="random"), train=["norm", "embed"]),
        adapter="c",
    )
    lora_fx.combine(model, {"default": 0.5, "b": 2.0}, adapter="d", method="cat")
    lora_fx.swap(model, {name: value + 0.125 for name, value in lora_fx.adapter_state(model, "b").items()}, adapter="b")
    lora_fx.drop(model, "default")
    lora_fx.rename(model, "d", "default")
    lora_fx.use(model, {"default": 1, "b": 0.5, "c": 0.5})


def _are_in(held: list[nn.Parameter], model: nn.Module) -> int:
    there = {id(parameter) for parameter in model.parameters()}
    return sum(id(parameter) in there for parameter in held)


def _rows(tuned: nn.Module) -> None:
    with lora_fx.rows(tuned, ["default", "b", None, "b"]):
        tuned(tokens())


def _others() -> dict[str, Any]:
    """Gradients with checkpointing, compiled code, autocast, a sequence-parallel norm; factors after dropout."""

    def make(backend: str = "auto", **options: Any) -> nn.Module:
        return adapted(rules(rule(LAYERS, **options)), backend=backend)

    tuned, same = parallel(make()), make("modules")
    torch.utils.checkpoint.checkpoint(tuned, tokens(), use_reentrant=False).square().mean().backward()
    same(tokens()).square().mean().backward()
    grads = [(whole(p.grad), q.grad) for p, q in zip(lora_fx.parameters(tuned), lora_fx.parameters(same), strict=True)]
    compiled = torch.compile(tuned, backend="aot_eager")(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        cast = (tuned(tokens()), same(tokens()))
    sequence = parallel(make(), **{"blocks.*.norm": SequenceParallel(), "blocks.*.v": SequenceParallel()})
    of_embedding = rules(rule("embed", dora=True))
    by_rows = {"embed": RowwiseParallel(input_layouts=Replicate())}
    by_rows_and_whole = (
        parallel(adapted(of_embedding, backend="modules"), **by_rows)(tokens()).detach(),
        adapted(of_embedding, backend="modules")(tokens()).detach(),
    )
    dropped = parallel(make(dropout=0.5)).train()
    torch.manual_seed(dist.get_rank())  # each process drops others
    train(dropped, 2)
    return {
        "grads": grads,
        "compiled": (compiled.detach(), same(tokens()).detach()),
        "cast": cast,
        "by rows": by_rows_and_whole,
        "flags": [p.requires_grad for name, p in sequence.named_parameters() if name == "blocks.0.v.weight"],
        "dropped": {name: p.to_local() for name, p in dropped.named_parameters() if _is_whole_factor(name, p)},
    }


def _is_whole_factor(name: str, parameter: Any) -> bool:
    return "lora_" in name and parameter.placements == (Replicate(),)


class Calls(Tokens):
    def forward(self, tokens: Any) -> Any:
        return super().forward(tokens) @ self.head.weight


def _refused() -> dict[str, tuple[str, list[str]]]:
    """What cannot be sharded, and which parameters are shards after that was refused."""
    reads = lora_fx.apply(Calls(), rules(rule("head")), (tokens(),), backend="modules")
    models = {
        "slices": (adapted(SLICED, backend="modules"), "blocks.*.up"),
        "reads": (reads, "head"),
        "invocation": (adapted(rules(rule("blocks.*.q", invocation=[1, 2])), backend="modules"), "blocks.*.q"),
        "rows": (adapted(rules(rule("blocks.*.q"), tokens=[{"name": "embed", "ids": [1, 5]}])), "embed"),
    }
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for name, (model, at) in models.items():
        text = refusal(lambda model=model, at=at: parallelize_module(model, mesh, {at: ColwiseParallel()}))
        found[name] = (text, [one for one, p in model.named_parameters() if hasattr(p, "placements")])
    return found


COLUMNS, ROWS, BOTH = (Shard(0),), (Shard(1),), (Replicate(),)
