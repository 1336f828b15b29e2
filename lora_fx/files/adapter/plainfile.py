"""A file with just the factors of an adapter, plain LoRA of linears on the base of the model: checked in one loop.

What is not as plain as that (DoRA, slices, banks, another base, an error) is for `swapping` to take apart, which says
what is wrong.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from lora_fx.adapters.dicts import KEPT_TARGETS
from lora_fx.adapters.factors.spec import AdapterSpec
from lora_fx.files.adapter.codec import filled, scaled
from lora_fx.files.adapter.keptfile import MOST_FILES, KeptFile, Stamp
from lora_fx.files.adapter.plainstate import KeptTargets, targets_in
from lora_fx.files.adapter.read import AdapterFile
from lora_fx.files.adapter.site import SavedSite
from lora_fx.files.fingerprint import SampledWeights, same_values
from lora_fx.models.together import PLAIN
from lora_fx.rules.ruleset import LoRAConfig

Copies = list[tuple[Tensor, Tensor]]


def copies_again(tuned: nn.Module, stamp: Stamp | None, adapter: str) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return the tensors of an adapter and the values for them in a file that was swapped in before; or None."""
    kept: KeptTargets | None = tuned.__dict__.get(KEPT_TARGETS)
    if stamp is None or kept is None or stamp not in kept.files or targets_in(tuned, adapter) is not kept:
        return None
    return kept.files[stamp].copies()


def plain_file_copies(tuned: nn.Module, file: AdapterFile, adapter: str, stamp: Stamp | None = None) -> Copies | None:
    """Return what is written where so that an adapter of the model computes what a file holds; or None.

    With the stamp of the file before it was read, it is kept for `copies_again`.
    """
    if file.header.trained or file.modules or file.rows or file.biases or file.config.blocks or file.config.kasa:
        return None
    kept = targets_in(tuned, adapter)
    if kept is None or len(kept.targets) != 2 * len({saved.path for saved in file.sites}):
        return None
    targets, copies, ratios = kept.targets, Copies(), dict[tuple[int, int], float]()
    bases: list[Tensor] = []
    homes: list[nn.Module] = []
    for saved in file.sites:
        pair = [f"{saved.path}.{factor}.{adapter}.weight".lstrip(".") for factor in ("lora_A", "lora_B")]
        A, B, home = targets.get(pair[0]), targets.get(pair[1]), kept.homes.get(pair[0])
        if A is None or B is None or home is None:
            return None
        spec: AdapterSpec | None = home._modules["lora_A"]._modules[adapter].__dict__.get("of")  # type: ignore[union-attr]
        base = home._parameters.get("weight")
        if spec is None or base is None or type(base) not in PLAIN or base.is_meta or not _is_plain(saved, spec, A, B):
            return None
        bases.append(base)
        homes.append(home)
        ratio = ratios.get((id(saved.lora), id(spec.lora)))
        if ratio is None:
            if not spec.lora.alpha:
                return None
            ratio = ratios[id(saved.lora), id(spec.lora)] = saved.lora.scaling / spec.lora.scaling
        copies += [(A, saved.lora_A), (B, scaled(saved.lora_B, ratio))]
    if not _is_base(file, bases):
        return None
    if stamp is not None and set(ratios.values()) == {1.0} and (again := KeptFile.of(copies, homes)) is not None:
        kept.files = dict([*kept.files.items(), (stamp, again)][-MOST_FILES:])
    return [(to, _fitting(to, value)) for to, value in copies]


def _is_plain(saved: SavedSite, spec: AdapterSpec, A: Tensor, B: Tensor) -> bool:
    """Whether a site of a file and an adapter of the model are plain LoRA of one linear, with room for its rank."""
    site, r = spec.site, saved.lora.r
    return (
        saved.noted
        and saved.path == site.path
        and saved.op == site.op == "linear"
        and not (saved.parameter or site.parameter or saved.read or site.read or saved.slices or spec.parts)
        and not (saved.calls or spec.calls or saved.embedding)
        and saved.magnitude is saved.bias is saved.added_bias is None
        and saved.file_ranks == 1
        and _trains_alike(saved.lora, spec.lora)
        and saved.lora_A.shape == (r, A.shape[1])
        and saved.lora_B.shape == (B.shape[0], r)
        and r <= A.shape[0] == B.shape[1]
    )


def _trains_alike(saved: LoRAConfig, own: LoRAConfig) -> bool:
    """Whether neither is more than two factors; dropout and first values stay the model's."""
    return not (saved.dora or own.dora or saved.bias or own.bias or saved.invocation or own.invocation) and (
        saved.share == own.share == "none"
    )


def _is_base(file: AdapterFile, bases: list[Tensor]) -> bool:
    """Whether the file was made on these weights, as far as it notes some of their values."""
    noted: Mapping[str, list[float] | None] = file.header.base
    found = zip((saved.path for saved in file.sites), SampledWeights(bases).values(), strict=True)
    return all(noted.get(path) == values or same_values(noted.get(path), values) for path, values in found)


def _fitting(target: Tensor, value: Tensor) -> Tensor:
    """Return a value in the dtype, place and shape of its target."""
    if value.dtype is not target.dtype or value.device != target.device:
        value = value.to(target.device, target.dtype)
    return filled(value, target)
