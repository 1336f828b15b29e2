"""The Trainer of transformers trains a twin: best checkpoint, a break, and going on as if there had been none."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lora_fx

CONFIG = LlamaConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=200, pad_token_id=0
)
torch.manual_seed(0)
TEXTS = torch.randint(1, 200, (16, 12))
DATA = [{"input_ids": text, "labels": text} for text in TEXTS]


def trainer(folder: Path, steps: int) -> Trainer:
    torch.manual_seed(0)  # in every process the same base
    tuned = lora_fx.apply(LlamaForCausalLM(CONFIG), "attention", optimise=False)  # so that a new process rounds alike
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, eval_steps=2, eval_strategy="steps", logging_steps=1,
        load_best_model_at_end=True, per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant",
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return Trainer(tuned, arguments, train_dataset=DATA, eval_dataset=DATA[:4])


with TemporaryDirectory() as home:
    whole = trainer(Path(home, "whole"), 4)
    whole.train()
    trainer(Path(home, "part"), 2).train()
    resumed = trainer(Path(home, "part"), 4)  # the same rules and adapter's name: values are matched by their keys
    resumed.train(resume_from_checkpoint=True)
    for one, other in zip(lora_fx.parameters(whole.model), lora_fx.parameters(resumed.model), strict=True):
        assert torch.equal(one, other)
    checkpoint = Path(whole.state.best_model_checkpoint)
    held = sum(value.numel() for value in load_file(checkpoint / "model.safetensors").values())
    print(f"best: {checkpoint.name}, {held:,} of {whole.model.num_parameters():,} numbers in it; resumed bit by bit")
    torch.manual_seed(0)
    loaded = lora_fx.load(LlamaForCausalLM(CONFIG).eval(), checkpoint)  # so does PEFT
    with torch.no_grad():
        assert torch.equal(loaded(TEXTS).logits, whole.model.eval()(TEXTS).logits)
