"""Work for two processes: a Llama that transformers' Trainer trains under FSDP2, with checkpoints, and resumes.

accelerate shards on accelerators alone; on processors it is told that it has some, and does what it does there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lora_fx
from tests.support.llamas import read_base, write_base
from tests.support.parallel import rules
from tests.support.sharded import files, rule, tokens, values_of

RULES = rules(rule("**.{q,v,up,down}_proj"), train=["model.norm"])
STEPS = 4


def trained(folder: Path) -> dict[str, Any]:
    """Train with a checkpoint after two steps of four; go on from it in another model; load what is written."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": str(dist.get_world_size())}
    home = write_base(folder / "base")
    whole = _trainer(home, folder / "whole")
    whole.train()
    resumed = _trainer(home, folder / "resumed")
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    whole.save_model(str(folder / "end"))
    model = whole.model
    lora_fx.save(model, folder / "saved")
    with torch.no_grad():
        written = model.generate(tokens()[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
        merged = lora_fx.merge(model).generate(tokens()[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    values, base = values_of(model), read_base(home, False)
    noted = (folder / "whole.jsonl").read_text().splitlines()
    return {
        "values": (values_of(resumed.model), values),
        "losses": [log["loss"] for log in whole.state.log_history if "loss" in log],
        "noted": [json.loads(line)["loss"] for line in noted if "loss" in line],
        "files": [files(folder / at) for at in ("saved", "end")],
        "loaded": (values_of(lora_fx.load(base, folder / "whole" / f"checkpoint-{STEPS}")), values),
        "generated": (written, merged),
    }


def _trainer(home: Path, folder: Path) -> Any:
    from accelerate import DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from transformers import Trainer, TrainingArguments

    from lora_fx.integrations.trainer import AdapterCheckpoints, RecordTraining

    AcceleratorState._reset_state()
    PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    model = read_base(home, False)
    model.config.use_cache = False
    torch.manual_seed(1)
    tuned = lora_fx.apply(model, RULES, {"input_ids": tokens()})
    settings = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "FULL_STATE_DICT"}
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        max_steps=STEPS,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        fsdp=True,
        fsdp_config=settings,
    )
    data = [{"input_ids": row, "labels": row} for step in range(4) for row in tokens(step)]
    callbacks = [AdapterCheckpoints(), RecordTraining(folder.with_suffix(".jsonl"))]
    trainer = Trainer(tuned, arguments, train_dataset=data, callbacks=callbacks)
    state = trainer.accelerator.state
    PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    trainer.is_fsdp_enabled = True
    return trainer
