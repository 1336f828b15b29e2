"""A tiny Llama on disk, read by several processes: whole, or by transformers' `tp_plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def write_base(folder: Path) -> Path:
    """Write a tiny Llama; all processes come back when it is there."""
    import transformers

    if dist.get_rank() == 0:
        torch.manual_seed(3)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 34, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    return folder


def read_base(folder: Path, planned: bool) -> Any:
    import transformers
    from transformers.distributed import DistributedConfig

    options = {"distributed_config": DistributedConfig(tp_plan="auto")} if planned else {}
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
