"""Work for several processes: TRL's trainers by accelerate's data parallel, with PEFT's adapters and with ours."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import trl
from datasets import Dataset
from transformers import PreTrainedModel
from trl.trainer import base_trainer

import lora_fx
from lora_fx.integrations.trl import trainer_of
from tests.support.preferences import decoder, logged, pairs, prompts, reward, settings, tokenizer

PEFT = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
FROM_PROMPTS = {"beta": 0.1, "num_generations": 4, "max_completion_length": 6}


def logs_of_all(folder: Path) -> dict[str, Any]:
    """Return for SFT, DPO and GRPO what was logged with PEFT's adapters and with ours, on both processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": str(dist.get_world_size())}
    PreTrainedModel.from_pretrained = _refuse  # no second model is loaded
    base_trainer.send_telemetry = lambda *_, **__: None
    texts = [prompt + more for prompt, more in zip(*(pairs()[name] for name in ("prompt", "chosen")), strict=True)]
    return {
        "sft": _both(trl.SFTTrainer, trl.SFTConfig, Dataset.from_dict({"text": 2 * texts}), folder),
        "dpo": _both(trl.DPOTrainer, trl.DPOConfig, _twice(pairs()), folder),
        "grpo": _both(trl.GRPOTrainer, trl.GRPOConfig, _twice(prompts()), folder, size=4, **FROM_PROMPTS),
    }


def _refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("a second model is loaded")


def _twice(data: Any) -> Any:
    return Dataset.from_dict({name: 2 * values for name, values in data.to_dict().items()})


def _both(kind: Any, config: Any, data: Any, folder: Path, size: int = 2, **options: Any) -> dict[str, Any]:
    more = {"processing_class": tokenizer(), "train_dataset": data}
    more |= {"reward_funcs": reward} if kind is trl.GRPOTrainer else {}
    torch.manual_seed(1)
    start = peft.get_peft_model(decoder(), peft.LoraConfig(**PEFT))
    arguments = settings(config, folder / "peft", size, **options)
    theirs = kind(decoder(), args=arguments, peft_config=peft.LoraConfig(**PEFT), **more)
    peft.set_peft_model_state_dict(theirs.model, copy.deepcopy(peft.get_peft_model_state_dict(start)))
    theirs.train()
    tuned, arguments = lora_fx.from_peft(start), settings(config, folder / "own", size, **options)
    ours = (
        kind(tuned, args=arguments, **more)
        if kind is trl.SFTTrainer
        else trainer_of(kind, tuned, args=arguments, **more)
    )
    ours.train()
    return {
        "logs": (logged(ours), logged(theirs)),
        "wrapped": type(ours.model_wrapped).__name__,
        "reference": type(getattr(ours, "ref_model", None)).__name__,
        "factors": [factor.detach().clone() for factor in lora_fx.parameters(tuned)],
    }
