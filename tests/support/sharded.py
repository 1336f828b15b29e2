"""Work for several processes: models that FSDP2 shards, and the same ones whole beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lora_fx


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.v = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = x + self.v(torch.tanh(self.q(x)))
        return x + self.down(torch.nn.functional.silu(self.up(x)))


class Tokens(nn.Module):
    """A stack of blocks over tokens; 33 rows and a rank of 3 do not divide by 2."""

    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(33, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 33)
        self.register_buffer("scale", torch.tensor([1.5]))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) * self.scale


def rule(name: str, **lora: Any) -> dict[str, Any]:
    return {"name": name, "match": {"name": name}, "lora": {"r": 3, "alpha": 6, **lora}}


PLAIN = {"version": 1, "rules": [rule("blocks.*.{q,up,down}"), rule("embed")], "train": ["norm", "head"]}
DORA = {"version": 1, "rules": [rule("blocks.*.{q,v,up,down}", dora=True, bias=True)]}
SLICED = {"version": 1, "rules": [{**rule("blocks.*.up"), "slices": {"of": ["a", "b", "c"], "adapt": ["a", "c"]}}]}
STARTED = {"version": 1, "rules": [rule("blocks.*.v", init="pissa"), rule("head")]}
RULES = {"plain": PLAIN, "dora": DORA, "sliced": SLICED, "started": STARTED}


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(0, 33, (4, 6), generator=torch.Generator().manual_seed(seed))


def adapted(rules: dict[str, Any], **options: Any) -> nn.Module:
    """Return an adapted model, the same in every process, with values in its adapters."""
    torch.manual_seed(3)
    tuned = lora_fx.apply(Tokens(), rules, (tokens(),), **options)
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.1)
    return tuned


def base() -> nn.Module:
    torch.manual_seed(3)
    return Tokens()


def sharded(tuned: Any, **options: Any) -> Any:
    """Shard a model block by block, in place, over all processes."""
    mesh = options.pop("mesh", None) or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in tuned.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(tuned, mesh=mesh, **options)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all values of a model, gathered."""
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def assert_folded_as_whole_ones(found: dict[str, Any]) -> None:
    """Assert that merged weights and codes have the bits of whole ones, cost the same, and are sharded."""
    for what in ("merged", "quantised again"):
        here, of_one = found[what]
        also = {name for name in of_one if ".weight." in name}  # bitsandbytes' of codes that are whole
        assert here.keys() == of_one.keys() - also
        assert all(torch.equal(value, of_one[name]) for name, value in here.items()), what
    for here, of_one in found["outputs of merged"]:
        torch.testing.assert_close(here, of_one, rtol=1e-5, atol=1e-6)
    assert found["costs"][0] == found["costs"][1] != []
    assert found["own memory"] == [True, True]
    assert "a function quantises whole layers" in found["refused to quantise"]


def keeps_no_more(model: nn.Module) -> bool:
    """Whether a process keeps the memory of its parts alone: none is a view of a tensor that was whole."""
    parts = [p for p in model.parameters() if hasattr(p, "to_local") and p.shape[0] > 1]
    kept = (part.to_local().untyped_storage().nbytes() < part.numel() * part.element_size() for part in parts)
    return bool(parts) and all(kept)


def train(model: nn.Module, steps: int = 2) -> list[float]:
    """Train an adapted model on the same data in every process; return the losses."""
    optimizer = torch.optim.SGD(lora_fx.parameters(model), lr=0.1)
    losses = []
    for step in range(steps):
        loss = model(tokens(step)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def alike(tuned: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Give a model that is not sharded these values."""
    tuned.load_state_dict(values)
    return tuned


def refusal(work: Callable[[], object]) -> str:
    """Return the error that some work raises, as text."""
    try:
        work()
    except lora_fx.LoraFxError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- what the processes do


def treated(folder: Path) -> dict[str, Any]:
    """Everything that is read from sharded adapters, beside the same model whole."""
    return {name: _treated(rules, folder / name) for name, rules in RULES.items()} | {"several": _several(folder)}


def read_by_more(folder: Path) -> dict[str, Any]:
    """What other processes have written as a checkpoint of adapters, read onto a mesh of these, first and last."""
    later = sharded(base())
    read = {}
    for name, tuned in (("first", sharded(adapted(PLAIN))), ("last", lora_fx.apply(later, PLAIN, (tokens(),)))):
        state = lora_fx.adapter_state(tuned)
        checkpoint.load(state, checkpoint_id=folder.parent / "plain" / "checkpoint")
        lora_fx.load_adapter_state(tuned, state)
        read[name] = values_of(tuned)
    return read


def _treated(rules: dict[str, Any], folder: Path) -> dict[str, Any]:
    tuned = sharded(adapted(rules))
    losses = train(tuned)
    same = adapted(rules)
    result: dict[str, Any] = {"losses": losses, "losses of one": train(same)}
    before = values_of(tuned)
    with torch.no_grad():
        with lora_fx.disabled(tuned):
            result["output of base"] = (tuned(tokens()), base()(tokens()))
        result["output"] = (tuned(tokens()), alike(same, before)(tokens()))  # now the root's parameters are whole
    checkpoint.save(lora_fx.adapter_state(tuned), checkpoint_id=folder / "checkpoint")
    return result | all_of(tuned, alike(same, before), folder) | {"before": before, "after": values_of(tuned)}


def all_of(tuned: nn.Module, same: nn.Module, folder: Path, inputs: Tensor | None = None) -> dict[str, Any]:
    """Everything that is read from sharded adapters, beside the same model whole."""
    given = tokens() if inputs is None else inputs
    lora_fx.save(tuned, folder / "sharded")
    there = files(folder / "sharded")  # on every process: all come back when the files are there
    if dist.get_rank() == 0:
        lora_fx.save(same, folder / "whole")
    dist.barrier()
    merged, removed = lora_fx.merge(tuned), lora_fx.remove(tuned)
    whole_merged, whole_removed = lora_fx.merge(same), lora_fx.remove(same)
    with torch.no_grad():
        outputs = {
            "output of merged": (merged(given), whole_merged(given)),
            "output of removed": (removed(given), whole_removed(given)),
        }
    return outputs | {
        "files": (there, files(folder / "whole")),
        "merged": (values_of(merged), values_of(whole_merged)),
        "own memory": keeps_no_more(merged),
        "removed": (values_of(removed), values_of(whole_removed)),
        "flags": (_flags(removed), _flags(whole_removed)),
        "classes": (type(merged).__mro__[2].__name__, type(removed.blocks[0]).__mro__[2].__name__),
        "deltas": (lora_fx.deltas(tuned).to_json(), lora_fx.deltas(same).to_json()),
        "listed": (str(lora_fx.list_adapters(tuned)), str(lora_fx.list_adapters(same))),
        "report": (str(lora_fx.inspect(tuned)), str(lora_fx.inspect(same))),
        "audit": (lora_fx.audit(tuned).to_json(), lora_fx.audit(same).to_json()),
    }


def _flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def _several(folder: Path) -> dict[str, Any]:
    def both() -> nn.Module:
        tuned = adapted({"version": 1, "rules": [rule("blocks.*.{q,up}")]})
        torch.manual_seed(5)
        lora_fx.add(tuned, {"version": 1, "rules": [rule("blocks.*.{up,down}", init="random")]}, adapter="b")
        lora_fx.use(tuned, {"default": 0.5, "b": 2})
        return tuned

    tuned, same = sharded(both()), both()
    result = all_of(tuned, same, folder / "several")
    with lora_fx.use(tuned, "b"):
        result["merged b"] = (values_of(lora_fx.merge(tuned)), values_of(lora_fx.merge(same, adapters="b")))
    lora_fx.drop(tuned, "default")
    lora_fx.drop(same, "default")
    lora_fx.rename(tuned, "b", "c")
    lora_fx.rename(same, "b", "c")
    with torch.no_grad():
        result["output of c"] = (tuned(tokens()), same(tokens()))
        with lora_fx.disabled(tuned):
            result["output of base"] = (tuned(tokens()), base()(tokens()))
    lora_fx.save(tuned, folder / "c sharded")
    result["files of c"] = sorted(files(folder / "c sharded"))
    return result


def refused(folder: Path) -> dict[str, Any]:
    """What cannot be done to a sharded model, and where one process alone has a reason."""
    tuned = sharded(adapted(PLAIN))
    plain = sharded(base())
    before = values_of(tuned)
    lora_fx.save(tuned, folder / "adapter")
    (folder / "file").write_text("")
    first, last = (dist.get_rank() == rank for rank in (0, 1))
    texts = {
        "remerge": refusal(lambda: lora_fx.remerge(plain)),
        "extract": refusal(lambda: lora_fx.extract(plain, base())),
        "export": refusal(lambda: lora_fx.export(tuned, folder / "out", "peft")),
        "requantize": refusal(lambda: lora_fx.merge(tuned, requantize=lambda module: module)),
        "save in a file": refusal(lambda: lora_fx.save(tuned, folder / "file")),
    }
    if last:
        with torch.no_grad():
            tuned.blocks[1].down.get_parameter("weight").to_local()[-1, -1] = torch.inf
    texts["merge"] = refusal(lambda: lora_fx.merge(tuned))
    return {"texts": texts, "before": before, "after": values_of(tuned), "first": first, "plain": values_of(plain)}


def started_empty(folder: Path) -> dict[str, Any]:
    """A model without values that is adapted, sharded, given memory and then values."""
    with torch.device("meta"):
        empty = Tokens()
    rules = {"version": 1, "rules": [rule("blocks.*.{q,down}", init="orthogonal"), rule("embed"), *SLICED["rules"]]}
    tuned = sharded(lora_fx.apply(empty, rules, (tokens().to("meta"),)))
    tuned.to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())  # each process draws otherwise
    for module in tuned.modules():
        if ".lora_fx." in f".{type(module).__module__}.":
            getattr(module, "reset_parameters", lambda: None)()
    values = base().state_dict()
    with torch.no_grad():
        for name, tensor in tuned.state_dict(keep_vars=True).items():
            if name in values:
                parts = getattr(tensor, "device_mesh", None)
                whole_value = values[name]
                if parts is not None:
                    from torch.distributed.tensor import distribute_tensor

                    whole_value = distribute_tensor(whole_value, parts, tensor.placements)
                tensor.copy_(whole_value)
    with torch.no_grad():
        result = {"output": tuned(tokens()), "base output": base()(tokens())}
    first = values_of(tuned)
    torch.manual_seed(3)
    same = alike(lora_fx.apply(base(), rules, (tokens(),)), first)
    result |= {"first": first, "losses": train(tuned, 3), "losses of one": train(same, 3)}
    result["hits"] = sum(region.hits for region in lora_fx.inspect(tuned).regions)
    result["merged"] = (values_of(lora_fx.merge(tuned)), values_of(lora_fx.merge(alike(same, values_of(tuned)))))
    result["removed"] = values_of(lora_fx.remove(tuned))
    result["base"] = {name: tensor.clone() for name, tensor in base().state_dict().items()}
    lora_fx.save(tuned, folder / "adapter")
    return result


def replicated(folder: Path) -> dict[str, Any]:
    """Four processes, two by two: the model is sharded over pairs, and the pairs have the same."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    tuned = sharded(adapted(PLAIN), mesh=mesh, reshard_after_forward=False)
    same = adapted(PLAIN)
    result: dict[str, Any] = {"losses": train(tuned), "losses of one": train(same)}
    return result | all_of(tuned, alike(same, values_of(tuned)), folder)
