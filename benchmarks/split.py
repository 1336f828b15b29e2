"""What processes that share layers keep and send: `python benchmarks/split.py` prints the table of
docs/beyond-one-machine.md.  Nothing is timed.

A Llama of two layers and no head, with rank 8 on all linear layers, in one process and in two of gloo, which share the
layers of attention and MLP (ColwiseParallel, RowwiseParallel); with blocks as modules, and as graphs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from beside import asked
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import lora_fx
from lora_fx.text import scaled

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.performance import told
from tests.support.processes import in_processes
from tests.support.splitgraphs import STYLES, Sums, kept

HEADS = ("processes", "blocks as", "kept by each", "over modules", "sums of a step", "of")
RULES = {"version": 1, "rules": [{"match": {"name": "layers.*.**", "op": "linear"}, "lora": {"r": 8, "alpha": 16}}]}


def llama(width: int) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2, "vocab_size": 1024}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, use_cache=False)
    return transformers.LlamaModel(config)


def measured(folder: Path) -> list[tuple[str, int, int, int]]:
    """Return (blocks as, bytes kept, sums, their bytes) of both ways here, of sizes that lie in the folder."""
    width, tokens = torch.load(folder / "sizes")
    x = {"input_ids": torch.randint(0, 1024, (tokens // 128, 128), generator=torch.Generator().manual_seed(1))}
    rows = []
    for name, backend in (("modules", "modules"), ("graphs", "auto")):
        torch.manual_seed(0)
        tuned: Any = lora_fx.apply(llama(width), RULES, x, backend=backend)
        if dist.get_world_size() > 1:
            parallelize_module(tuned, init_device_mesh("cpu", (dist.get_world_size(),)), STYLES)
        for _ in range(2):
            tuned(**x).last_hidden_state.square().mean().backward()
        with Sums() as sent:
            tuned(**x).last_hidden_state.square().mean().backward()
        rows.append((name, kept(tuned, x), sent.number, sent.bytes))
    return rows


def main(words: Sequence[str] | None = None) -> None:
    parser: argparse.ArgumentParser = asked(__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args(words)
    table: list[tuple[str, ...]] = [HEADS]
    for number in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            torch.save((options.width, options.tokens), Path(folder) / "sizes")
            rows = in_processes(number, measured, Path(folder), fresh=True)[0]
        whole = rows[0][1]
        for name, size, sums, sent in rows:
            table.append(
                (
                    str(number),
                    name,
                    scaled(size, "B"),
                    f"{size / whole:.3f}",
                    str(sums),
                    scaled(sent, "B") if sums else "",
                )
            )
    told(options.write, "split", table)


if __name__ == "__main__":
    main()
