"""vllm: PEFT's directory, held to what vLLM's loader accepts (0.33, read in its own parser).

vLLM itself needs another torch than ours and is not run: verifying loads the directory in PEFT.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from lora_fx.adapters.attach import all_attached
from lora_fx.exporters import peft
from lora_fx.exporters.plain import evened
from lora_fx.exporters.target import Refusal, Target, expressed, refusals
from lora_fx.files.adapter.describe import Described, describe
from lora_fx.files.adapter.names import PREFIX, factor_key
from lora_fx.files.adapter.write import files_of, write_adapter

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be."""
_MERGE = "; serve merged weights: target='merged'"
REFUSED = {
    "dora": f"vLLM refuses DoRA{_MERGE}",
    "bias": f"vLLM refuses trained biases{_MERGE}",
    "invocation": "vLLM passes over alora_invocation_tokens, and would act on every token; target='peft' has them",
    "train": f"vLLM refuses modules trained whole{_MERGE}",
    "tokens": f"vLLM refuses rows of embeddings{_MERGE}",
    "convolution": f"vLLM has no adapters of convolutions{_MERGE}",
    "embedding": f"the names of embeddings are vLLM's own, model by model{_MERGE}",
    "attention": f"vLLM's models have no nn.MultiheadAttention{_MERGE}",
    "parameter": f"vLLM refuses adapters of raw parameters{_MERGE}",
    "experts": f"vLLM reads adapters of experts under other names, expert by expert{_MERGE}",
    "calls": f"vLLM has one adapter for all calls of a module{_MERGE}",
    "adapters": "vLLM runs one adapter for a request; give all rules one `adapter:`",
}


def refused(tuned: nn.Module) -> Iterator[Refusal]:
    """Yield (path, reason) for what vLLM's loader refuses or PEFT would compute otherwise."""
    yield from refusals(tuned, REFUSED)
    yield from peft.beyond_peft(tuned)
    for path, adapter in all_attached(tuned):
        if adapter.spec.rank > RANKS[-1]:
            yield path, f"rank {adapter.spec.rank} is above vLLM's largest, {RANKS[-1]}{_MERGE}"


def write(tuned: nn.Module, path: Path, bake: bool = False) -> None:
    """Write the directory; with `bake`, one rank and one alpha for all: what differs goes into the factors."""
    (described,) = describe(tuned)
    if bake:
        described = _baked(described, tuned)
    accepted = replace(described, config=_accepted(described), metadata={"format": "pt"})
    write_adapter(path, files_of(accepted, Path()))


def _accepted(described: Described) -> dict[str, object]:
    """Return the configuration; vLLM takes modules as a list only, of whole names or their ends."""
    if isinstance(described.config["target_modules"], list):
        return described.config
    names = {key.removeprefix(PREFIX).split(".lora_")[0] for key in described.tensors}
    return described.config | {"target_modules": sorted(names)}


def _baked(described: Described, tuned: nn.Module) -> Described:
    """Return the adapter with the same rank and scaling at every site, and no patterns."""
    tensors: dict[str, Tensor] = {}
    adapters = evened(tuned)
    for even in adapters:
        tensors |= {factor_key(even.path, "lora_A"): even.A, factor_key(even.path, "lora_B"): even.B}
    first = adapters[0]
    one = {"r": first.rank, "lora_alpha": first.alpha, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return replace(described, tensors=tensors, config=described.config | one)


TARGET = Target(
    name="vllm",
    writes="a directory",
    client="PEFT, by vLLM's rules",
    refused=refused,
    write=write,
    verify=peft.verify,
    extra="export",
    verify_needs=("peft",),
    expresses=expressed(REFUSED, {"slices"}),
    options={"bake": "one rank and one alpha for all modules, for servers that read no rank_pattern and alpha_pattern"},
)
