"""DPOTrainer of TRL with the twin's own base as its reference: no second model is loaded."""

from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

import lora_fx
from lora_fx.integrations.trl import trainer_of

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
    "chosen": [" sat on the mat", " ran far", " sat on a mat", " ran far"],
    "rejected": [" ran", " sat", " ran far", " sat on a mat"],
})  # fmt: skip

with TemporaryDirectory() as folder:
    arguments = DPOConfig(
        folder, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, beta=0.1,
    )  # fmt: skip
    trainer = trainer_of(DPOTrainer, tuned, args=arguments, processing_class=tokenizer, train_dataset=data)
    trainer.train()

log = [line for line in trainer.state.log_history if "rewards/margins" in line]
print(f"margin of rewards {log[0]['rewards/margins']:.2f} → {log[-1]['rewards/margins']:.2f}, {trainer.ref_model}")
