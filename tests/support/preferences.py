"""For the tests of TRL's trainers: a tokenizer of twelve words, data, and a decoder, all made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", "<unk>", "the", "cat", "sat", "on", "mat", "dog", "ran", "far", "good", "bad"]
PROMPTS = ["the cat", "the dog", "the mat", "the cat sat"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def decoder() -> Any:
    """Return a tiny decoder for these words, the same at every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1))


def pairs() -> Any:
    chosen, rejected = [" sat on the mat", " ran far", " good", " on mat"], [" bad", " sat far", " bad bad", " ran"]
    return Dataset.from_dict({"prompt": PROMPTS, "chosen": chosen, "rejected": rejected})


def prompts() -> Any:
    return Dataset.from_dict({"prompt": PROMPTS})


def reward(completions: list[str], **_: Any) -> list[float]:
    return [len(set(text.split())) + 0.1 * text.count("cat") for text in completions]


def settings(kind: Any, folder: Path, size: int, **options: Any) -> Any:
    """Return a configuration of four steps of TRL's, on processors, that writes nothing."""
    return kind(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=size, learning_rate=0.05, logging_steps=1,
        report_to=[], disable_tqdm=True, use_cpu=True, seed=1, save_strategy="no", bf16=False, **options,
    )  # fmt: skip


def logged(trainer: Any) -> list[dict[str, float]]:
    """Return what a trainer has logged, but for times."""
    history = trainer.state.log_history
    return [
        {key: value for key, value in line.items() if "time" not in key and "second" not in key} for line in history
    ]
