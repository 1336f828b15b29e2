"""What rules say of banks of matrices alone: which factor all have together, and how r is divided among them."""

from dataclasses import replace

from lora_fx.planning.sites import Site
from lora_fx.rules.ruleset import LoRAConfig

_FIRST = ("gate_up_proj", "gate_proj", "up_proj", "gate", "up", "w1", "w3", "w13", "v1", "fc1", "wi", "input_linear")
_LAST = ("down_proj", "down", "w2", "fc2", "wo", "output_linear")
"""Names of the matrices that what enters an expert meets first, and of those that what leaves it meets last."""


def unfit_for_bank(site: Site, lora: LoRAConfig, sliced: bool) -> str | None:
    """Return why a bank cannot have the adapter that a rule wants for each of its matrices; None if it can.

    Sites that are no banks can have what is said of banks alone: it does not concern them.
    """
    if not site.is_banked:
        return None
    if lora.share != "none" and sliced:
        return "share is for whole matrices of a bank, not for slices; leave out one"
    if lora.share == "outer" and _outer(site) == "none":
        name = site.weight.rpartition(".")[2]
        return f"whether {name} is the first matrix of the experts or the last is not known; write share: A or share: B"
    divisor = lora.divide_r or site.bank
    if lora.r % divisor:
        what = "experts" if lora.divide_r == 0 else "parts"
        return f"r = {lora.r} cannot be divided among {divisor} {what}: take a multiple of {divisor}"
    return None


def at_site(site: Site, lora: LoRAConfig) -> LoRAConfig:
    """Return an adapter as it is at a site: with the r of each matrix, and the factor that all share by its name.

    There must be nothing `unfit_for_bank`.
    """
    if lora.share == "none" and lora.divide_r == 1:
        return lora
    if not site.is_banked:
        return replace(lora, share="none", divide_r=1)
    share = _outer(site) if lora.share == "outer" else lora.share
    return replace(lora, r=lora.r // (lora.divide_r or site.bank), share=share, divide_r=1)


def is_decided(site: Site, lora: LoRAConfig, sliced: bool) -> bool:
    """Whether an adapter is as a plan can have it at a site."""
    return lora == at_site(site, lora) and not (sliced and lora.share != "none")


def _outer(site: Site) -> str:
    """Return which factor lies at the outer side of the experts: A of the first matrix, B of the last."""
    name = site.weight.removesuffix(".weight").rpartition(".")[2]
    return "A" if name in _FIRST else "B" if name in _LAST else "none"
