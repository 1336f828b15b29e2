#!/usr/bin/env bash
# Who:       trl 1.16.0 (transformers 5.23.0, torch 2.13.0).
# What:      DPOTrainer logs `num_tokens`, the tokens that it has seen in the training. In a training that is resumed from
#            a checkpoint the count begins at 0 again, while the number of the step and the learning rate go on. What
#            transformers counts itself, `num_input_tokens_seen`, goes on.
# Expected:  after step 4 the same number, whether the training was interrupted after step 2 or not.
# Seen:      in one go              step 2: n, step 4: 2 n
#            resumed after step 2   step 4: n
# Way out:   add what the last line before the checkpoint has.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0
cat > "$folder/run.py" <<'PYTHON'
import pathlib
import sys
import warnings

import datasets
import tokenizers
import torch
import transformers
import trl

warnings.simplefilter("ignore")
home = pathlib.Path(sys.argv[1])
WORDS = ["<pad>", "<eos>", "<unk>", "good", "bad", "is", "it", "."]


def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=1, bos_token_id=None, pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


words = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
plain = tokenizers.Tokenizer(words)
plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
pairs = datasets.Dataset.from_dict({"prompt": ["it is"] * 8, "chosen": [" good ."] * 8, "rejected": [" bad ."] * 8})


def trained(name, steps, resumed=None):
    """Return num_tokens as logged, by step."""
    args = trl.DPOConfig(
        output_dir=str(home / name), max_steps=steps, per_device_train_batch_size=2, save_steps=2, logging_steps=2,
        save_strategy="steps", report_to=[], disable_tqdm=True, use_cpu=True, bf16=False,
    )
    trainer = trl.DPOTrainer(model(), ref_model=model(), args=args, processing_class=tokenizer, train_dataset=pairs)
    trainer.train(resume_from_checkpoint=resumed)
    return {line["step"]: int(line["num_tokens"]) for line in trainer.state.log_history if "num_tokens" in line}


whole = trained("whole", 4)
part = trained("part", 2)
resumed = trained("resumed", 4, str(home / "part" / "checkpoint-2"))
print("torch", torch.__version__, "transformers", transformers.__version__, "trl", trl.__version__)
print("in one go             by step:", whole)
print("until step 2          by step:", part)
print("resumed after step 2  by step:", resumed)
n = whole[2]
sys.exit((whole[4], part[2], resumed[4]) != (2 * n, n, n))
PYTHON
"$folder/env/bin/python" "$folder/run.py" "$folder" 2> "$folder/errors" > "$folder/output" || {
    tail -n 20 "$folder/output" "$folder/errors"
    exit 1
}
grep -v "^{" "$folder/output"
