"""GRPOTrainer of TRL with a KL term to the twin's own base: no second model is loaded."""

from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

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
data = Dataset.from_dict({"prompt": ["the cat", "the dog", "a cat", "a dog"]})


def reward(completions: list[str], **_: object) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


with TemporaryDirectory() as folder:
    arguments = GRPOConfig(
        folder, max_steps=8, per_device_train_batch_size=16, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, bf16=False,
        beta=0.04, num_generations=4, max_completion_length=6,
    )  # fmt: skip
    options = {"processing_class": tokenizer, "train_dataset": data, "reward_funcs": reward}
    trainer = trainer_of(GRPOTrainer, tuned, args=arguments, **options)
    trainer.train()

log = [line for line in trainer.state.log_history if "kl" in line]
print(f"reward {log[0]['reward']:.2f} → {log[-1]['reward']:.2f}, KL {log[-1]['kl']:.3f} to {trainer.ref_model}")
