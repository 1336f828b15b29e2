"""What a streaming merge costs: `python benchmarks/merge_checkpoint.py --gigabytes 4` prints it for this machine.

A sharded bfloat16 checkpoint of random weights, of Llama's shapes, and an adapter on every linear of its blocks (rank
16).  Time is that of a merge over that of a plain copy of the same files, paired, in the same order and both synced to
disk; the copy without syncing is printed beside.  Memory is the largest RSS of a process that does nothing else, above
the same process before the merge, with everything imported; the adapter's own bytes are printed beside.

The floor is what the arithmetic alone takes where nothing is read or written, all values lie in cache and the threads
share it evenly: the products B A; W to float32, added and rounded; and what the report sums up.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_fx import merge_checkpoint

RANK = 16
SHARD_BYTES = 1 << 30
ROWS = 32
"""Rows of a weight whose values are computed at a time for the floor."""
SIZES = {"wide": 4096, "inner": 11008, "vocabulary": 32000}
MEASURED = """
import json, sys
import lora_fx
merge = lora_fx.merge_checkpoint  # imports what it needs
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))
base, adapter, out = sys.argv[1:]
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the highest RSS counts from here
idle = status("VmRSS")
merge(base, adapter, out)
print(json.dumps({"idle": idle, "highest": status("VmHWM")}))
"""


def linears(number: int, wide: int, inner: int) -> Iterator[tuple[str, int, int]]:
    """Yield (path, out, in) of a block's linears."""
    for name in ("q", "k", "v", "o"):
        yield f"model.layers.{number}.self_attn.{name}_proj", wide, wide
    for name in ("gate", "up"):
        yield f"model.layers.{number}.mlp.{name}_proj", inner, wide
    yield f"model.layers.{number}.mlp.down_proj", wide, inner


def write_base(folder: Path, size: int, wide: int, inner: int, vocabulary: int) -> list[tuple[str, int, int]]:
    """Write blocks until the size is reached, in shards, and return the linears."""
    made, tensors, shards, written = [], {}, [], 0
    pending: dict[str, Tensor] = {"model.embed_tokens.weight": weight(vocabulary, wide)}
    number = 0
    folder.mkdir(parents=True)
    while written + bytes_of(tensors) + bytes_of(pending) < size:
        if bytes_of(tensors) > SHARD_BYTES:
            shards.append(tensors)
            written += bytes_of(tensors)
            save_file(tensors, folder / f"model-{len(shards):05}.safetensors", {"format": "pt"})
            tensors = {}
        tensors |= pending
        block = list(linears(number, wide, inner))
        pending = {f"{path}.weight": weight(*shape) for path, *shape in block}
        pending[f"model.layers.{number}.input_layernorm.weight"] = weight(1, wide)[0].clone()
        made += block
        number += 1
    shards.append(tensors | pending)
    save_file(shards[-1], folder / f"model-{len(shards):05}.safetensors", {"format": "pt"})
    placed = {key: f"model-{n:05}.safetensors" for n, shard in enumerate(shards, 1) for key in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    return made


def weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.bfloat16) * 0.02


def bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def write_adapter(folder: Path, sites: list[tuple[str, int, int]]) -> int:
    """Write an adapter for the linears and return its bytes."""
    tensors = {}
    for path, out, inputs in sites:
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(RANK, inputs) * 0.01
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out, RANK) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": [path for path, *_ in sites]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return bytes_of(tensors)


def copied(base: Path, out: Path, synced: bool) -> float:
    """Return the seconds of a plain copy."""
    started = time.perf_counter()
    out.mkdir()
    for path in sorted(base.iterdir()):
        shutil.copyfile(path, out / path.name)
        if synced:
            with (out / path.name).open("rb+") as file:
                os.fsync(file.fileno())
    return time.perf_counter() - started


def merged(base: Path, adapter: Path, out: Path) -> float:
    """Return the seconds of a merge."""
    started = time.perf_counter()
    merge_checkpoint(base, adapter, out)
    return time.perf_counter() - started


def measure_time(base: Path, adapter: Path, work: Path, pairs: int) -> float:
    """Print what a merge takes beside a copy, and return the seconds of the copy that is synced."""
    rows = []
    copied(base, work / "first", synced=True)  # what was just written is on disk and in the page cache
    shutil.rmtree(work / "first")
    for _ in range(pairs):
        times = []
        for run in (
            lambda out: copied(base, out, synced=False),
            lambda out: copied(base, out, synced=True),
            lambda out: merged(base, adapter, out),
        ):
            times.append(run(work / "out"))
            shutil.rmtree(work / "out")
            os.sync()
        rows.append(times)
    plain, synced, merge = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(c / b for _, b, c in rows)
    unsynced = statistics.median(c / a for a, _, c in rows)
    print(f"copy {synced:.2f} s synced ({plain:.2f} s not synced), merge {merge:.2f} s (synced)")
    print(f"merge over copy: {ratio:.2f} (over a copy that is not synced: {unsynced:.2f}); {pairs} pairs, medians")
    return synced


def arithmetic(sites: list[tuple[str, int, int]]) -> dict[str, float]:
    """Return the seconds that one thread takes for the steps of a merge of these linears."""
    seconds = dict.fromkeys(("product", "sum", "report"), 0.0)
    for _, out, inputs in sites:
        left, right = torch.randn(ROWS, RANK), torch.randn(RANK, inputs)
        stored = weight(ROWS, inputs).view(-1)
        base, delta, merged = (torch.empty(stored.numel()) for _ in range(3))
        for _ in range(out // ROWS):
            times = [time.perf_counter()]
            torch.mm(left, right, out=delta.view(ROWS, inputs))
            times.append(time.perf_counter())
            base.copy_(stored)
            stored.copy_(torch.add(base, delta, out=merged))
            times.append(time.perf_counter())
            torch.dot(base, base)
            torch.dot(merged.copy_(stored).sub_(base), delta)
            times.append(time.perf_counter())
            for name, begun, ended in zip(seconds, times, times[1:], strict=False):
                seconds[name] += ended - begun
    return seconds


def measure_floor(sites: list[tuple[str, int, int]], copy: float, pairs: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = [arithmetic(sites) for _ in range(pairs)]
    finally:
        torch.set_num_threads(threads)
    best = {name: min(run[name] for run in runs) for name in runs[0]}
    floor = sum(best.values()) / threads
    steps = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in best.items())
    print(f"floor of the arithmetic: {floor / copy:.2f} of the synced copy ({steps}; over {threads} threads)")


def measure_memory(base: Path, adapter: Path, work: Path, adapter_bytes: int) -> None:
    command = [sys.executable, "-c", MEASURED, str(base), str(adapter), str(work / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    content = json.loads(done.stdout)
    shutil.rmtree(work / "out")
    above, own = (content["highest"] - content["idle"]) / 1024, adapter_bytes / 2**20
    print(
        f"highest RSS: {above:.0f} MiB above the idle process ({content['idle'] / 1024:.0f} MiB), of which the adapter "
        f"takes {own:.0f} MiB: {above - own:.0f} MiB"
    )


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--gigabytes", type=float, default=1.0)
    asked.add_argument("--pairs", type=int, default=3)
    asked.add_argument("--folder", help="where to work; default: the temporary directory")
    options = asked.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        sites = write_base(work / "base", int(options.gigabytes * 1e9), **SIZES)
        adapter_bytes = write_adapter(work / "adapter", sites)
        size = sum(path.stat().st_size for path in (work / "base").iterdir())
        shards = len(list((work / "base").glob("*.safetensors")))
        print(
            f"{size / 1e9:.1f} GB in {shards} shards, {len(sites)} adapted linears, {torch.get_num_threads()} threads"
        )
        measure_memory(work / "base", work / "adapter", work, adapter_bytes)
        synced = measure_time(work / "base", work / "adapter", work, options.pairs)
        measure_floor(sites, synced, options.pairs)


if __name__ == "__main__":
    main()
