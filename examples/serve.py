"""Many adapters on one base: each row of a batch has its own, and one gets new values while the model goes on."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=200, pad_token_id=0
)
base = LlamaForCausalLM(config).eval()


def trained(folder: Path) -> None:
    """Save an adapter, as if it had been trained."""
    tuned = lora_fx.apply(base, "attention")
    for parameter in lora_fx.parameters(tuned):
        torch.nn.init.normal_(parameter, std=0.3)
    lora_fx.save(tuned, folder)


def alone(folder: Path, prompt: torch.Tensor) -> torch.Tensor:
    """Return what an adapter says when nothing else is served."""
    return lora_fx.load(base, folder).generate(prompt, max_new_tokens=4, do_sample=False)[0]


with TemporaryDirectory() as home:
    folders = [Path(home, name) for name in ("ann", "bob", "cid")]
    for folder in folders:
        trained(folder)
    served = lora_fx.load(base, folders[0])
    lora_fx.rename(served, "default", "ann")
    lora_fx.add(served, folders[1], adapter="bob")

    prompts = torch.randint(1, 200, (3, 6))
    with lora_fx.rows(served, ["ann", "bob", None]):  # one batch: two users, and the base
        answers = served.generate(prompts, max_new_tokens=4, do_sample=False)
    for row, folder in enumerate(folders[:2]):
        assert torch.equal(answers[row], alone(folder, prompts[row : row + 1]))
    assert torch.equal(answers[2], base.generate(prompts[2:], max_new_tokens=4, do_sample=False)[0])

    graphs = sum(region.graphs for region in lora_fx.inspect(served).regions)
    lora_fx.swap(served, folders[2], adapter="bob")  # a new version of one; the model goes on serving
    with lora_fx.rows(served, ["bob", "ann"]):
        answers = served.generate(prompts[:2], max_new_tokens=4, do_sample=False)
    assert torch.equal(answers[0], alone(folders[2], prompts[:1]))
    assert sum(region.graphs for region in lora_fx.inspect(served).regions) == graphs
    shared = {p.data_ptr() for p in base.parameters()} & {p.data_ptr() for p in served.parameters()}
    print(lora_fx.list_adapters(served))
    print(f"{len(shared)} of {len([*base.parameters()])} weights of the base are shared; each row answers as alone")
