"""SFTTrainer of TRL trains a twin: the answers alone count, and what it saves is the adapter."""

from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import lora_fx

WORDS = ["<pad>", "<eos>", "<unk>", "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "far", "good", "bad"]
words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=len(WORDS)
)
base = LlamaForCausalLM(config)  # of yours: LlamaForCausalLM.from_pretrained(…)
tuned = lora_fx.apply(base, "attention")
data = Dataset.from_dict({
    "prompt": ["the cat", "the dog", "a cat", "a dog"],
    "completion": [" sat on the mat", " ran far", " sat on a mat", " ran far"],
})  # fmt: skip

with TemporaryDirectory() as folder:
    arguments = SFTConfig(
        folder, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(tuned, args=arguments, processing_class=tokenizer, train_dataset=data)
    trainer.train()
    trainer.save_model(folder)
    loaded = lora_fx.load(base, folder)  # so does PEFT

losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}")
print(lora_fx.list_adapters(loaded))
