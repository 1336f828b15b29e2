#!/usr/bin/env bash
# Who:       transformers 5.23.0 with torch's checkpoint_wrapper (torch 2.13.0), on the processor.
# What:      a decoder in training fills a KV cache unless use_cache=False is passed. transformers' own
#            gradient_checkpointing_enable switches that off; torch's checkpoint_wrapper around the layers knows nothing
#            of it. In the backward pass a layer is run again on a cache that it has filled already: its keys are the old
#            ones and the new ones. With CheckpointImpl.REENTRANT the old ones have no graph, and a causal layer looks
#            at them alone: k_proj's gradient is exactly zero and 21 more gradients of 30 are wrong, at the loss that
#            it has without checkpointing, and nothing is said. With the default, NO_REENTRANT, the gradients are right;
#            rows with padding on the left end in an error of sizes with both.
# Expected:  the gradients of the model without checkpointing, or an error, as the wrapper's one purpose is to compute
#            the same with less memory.
# Seen:      gradients that differ from those without checkpointing, of 30
#              use_cache=False     0 with both
#              default             0 with NO_REENTRANT, 22 with REENTRANT
# Way out:   model.config.use_cache = False, or use_cache=False in each call.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cat > "$folder/run.py" <<'PYTHON'
import importlib.metadata
import sys

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
PADDED = torch.ones(2, 12, dtype=torch.long)
PADDED[0, :4] = 0


def step(how, use_cache, mask=None):
    """Return the loss and the gradients of a training step, by their names without the wrapper's."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, use_cache=use_cache)).train()
    if how is not None:
        for index, layer in enumerate(model.model.layers):
            model.model.layers[index] = checkpoint_wrapper(layer, checkpoint_impl=how)
    ids = torch.arange(24).view(2, 12)
    loss = model(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    named = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    return loss.item(), named


def other(how, use_cache):
    """Return how many gradients differ from those without checkpointing, and the length of one of k_proj."""
    loss, right = step(None, use_cache)
    again, got = step(how, use_cache)
    assert again == loss
    differ = sum(not torch.allclose(got[name], right[name], rtol=1e-4, atol=1e-7) for name in right)
    return differ, float(got["model.layers.0.self_attn.k_proj.weight"].norm()), len(right)


def padded(how):
    """Return the error of a step with padding on the left."""
    try:
        step(how, True, PADDED)
    except RuntimeError as error:
        return type(error).__name__
    return "none"


print(*(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")))
seen = {(how, cache): other(how, cache) for how in CheckpointImpl for cache in (False, True)}
for (how, cache), (differ, keys, of) in seen.items():
    print(f"{how.name:<13} use_cache={cache!s:<6} {differ:>2} of {of} gradients differ; k_proj's length {keys:.6f}")
errors = [padded(how) for how in CheckpointImpl]
print("padded rows, use_cache=True:", *errors)
reentrant, kept = CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT
right = not (seen[kept, False][0] or seen[kept, True][0] or seen[reentrant, False][0])
if not (right and seen[reentrant, True][:2] == (22, 0.0) and errors == ["RuntimeError"] * 2):
    sys.exit("changed: a layer that is checkpointed no longer meets the cache that it has filled")
print("as described: beside a cache, what a reentrant checkpoint makes again has other gradients")
PYTHON
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/run.py" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
