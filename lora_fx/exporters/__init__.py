"""Write an adapted model in the format of another program: what cannot be expressed exactly is refused, with why."""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.adapters.attach import with_values
from lora_fx.adapters.selection import Selection
from lora_fx.errors import ExportError
from lora_fx.exporters.registry import BUILT_IN, GROUP, names, target_named, targets
from lora_fx.exporters.running import largest_difference, outputs_of_both
from lora_fx.exporters.target import FEATURES, Ability, Refusal, Target, at_one_weight
from lora_fx.files.atomic import files_in
from lora_fx.files.replacing import staged
from lora_fx.models.fsdp import refuse_sharded
from lora_fx.models.samples import Sample
from lora_fx.models.twin import is_meta, make_twin
from lora_fx.planning.render.notebook import InNotebook
from lora_fx.progress.steps import step
from lora_fx.sources.regular import UnreadableError, check_path
from lora_fx.text import listing
from lora_fx.tuned.build import record_in
from lora_fx.tuned.several import only
from lora_fx.tuned.switching import switches_in

__all__ = ["BUILT_IN", "FEATURES", "GROUP", "Ability", "Exported", "Refusal", "Target"]
__all__ += ["export", "names", "target_named", "targets"]

_ROUNDING = {torch.float64: 1.0, torch.float32: 1.0, torch.float16: 200.0, torch.bfloat16: 2000.0}
"""How many times the tolerance of float32 a dtype has: a few roundings of 2⁻¹¹ and 2⁻⁸ of values of order one."""


@dataclass(frozen=True, slots=True)
class Exported(InNotebook):
    """What an export has written, and what verifying it has shown."""

    target: str
    path: Path
    difference: float | None = None
    """max |Δ| of the outputs, ours against the client's; None where that was not asked for."""
    tolerance: float = 0.0
    effect: float = 0.0
    """max |Δ| of the outputs with the adapter against without it: what a lost adapter would show as difference."""

    def __str__(self) -> str:
        text = f"{self.target}: {self.path} written"
        if self.difference is None:
            return text
        difference = f"max |Δ| {self.difference:.2g} (tolerance {self.tolerance:.2g}"
        compared = f"{difference}; the adapter changes {self.effect:.2g})"
        return f"{text}\n  verified in {target_named(self.target).client}: {compared}"


def readable(tuned: nn.Module) -> nn.Module:
    """Return the model itself; where accelerate offloads its factors, a twin that holds them.

    Raises:
        RefusedError: processes hold parts of the model.
    """
    advice = "lora_fx.save the adapter, then lora_fx.load it beside the base that is not sharded, and export that"
    refuse_sharded(tuned, "a model of which each process holds a part is not exported", advice)
    return with_values(tuned)


def export(
    tuned: nn.Module, path: Path, target: str, sample: Sample | None = None, verify: bool = False, **options: Any
) -> Exported:
    """Write the adapted model for a target, whole or not at all, and return what was written; the model stays as it is.

    Raises:
        ExportError: names every site that cannot be expressed, an extra that is not installed, an unknown option, or
            the difference that verifying has found; nothing is written then.
    """
    chosen, path = target_named(target), Path(path).absolute()
    with step("checking"):
        tuned = _with_one_used(tuned, chosen)
        _check(tuned, chosen, sample, verify, options)
    still = make_twin(tuned, freeze=False).eval()
    if chosen.several != "in use":
        for switch in switches_in(still):
            switch.choose(Selection.of(switch.names))
    given = {**options, "sample": sample} if chosen.needs_sample else options
    with _staged(target, path) as stage:
        with step("writing", total=None, share=5):
            chosen.write(still, stage, **given)
        if not verify or sample is None:
            return Exported(target, path)
        kept = {name: value for name, value in options.items() if name in chosen.verify_options}
        with step("verifying", total=4, share=4):
            return _verified(chosen, still, stage, path, sample, kept)


@contextlib.contextmanager
def _staged(target: str, path: Path) -> Iterator[Path]:
    """Give a path of the same name in a fresh directory beside; at the end, move all that is in there into place.

    An existing directory is written into only if nothing of it would stay: files of another export among the new ones
    would be read with them.

    Raises:
        ExportError: the path cannot be written, or is a directory with something else in it.
    """

    def refuse_mixing(new: Path, old: Path) -> None:
        if not old.exists() or (new.is_file() and old.is_file()):
            return
        if new.is_dir() != old.is_dir():
            raise ExportError(target, f"{old} is there already, and is {'a directory' if old.is_dir() else 'a file'}")
        foreign = sorted(str(name) for name in files_in(old) - files_in(new))
        if foreign:
            facts = [(name,) for name in foreign[:6]]
            raise ExportError(target, f"{old} holds other files", facts, "choose another path")

    try:
        check_path(path)
        with staged(path, refuse_mixing) as stage:
            yield stage
    except OSError as error:
        raise ExportError(target, f"{path} cannot be written: {error.strerror or error}") from error
    except UnreadableError as error:
        raise ExportError(target, f"{path} {error}") from error


def _check(tuned: nn.Module, chosen: Target, sample: Sample | None, verify: bool, options: dict[str, Any]) -> None:
    record_in(tuned)
    unknown = [name for name in options if name not in chosen.options]
    if unknown:
        known = [(name, about) for name, about in chosen.options.items()] or [("it takes", "no options")]
        raise ExportError(chosen.name, f"there is no option {listing(unknown)}", known)
    if is_meta(tuned):
        raise ExportError(chosen.name, "the model is on the meta device and has no values to write")
    _check_adapters(tuned, chosen)
    refusals = list(dict.fromkeys(chosen.refused(tuned)))
    if refusals:
        raise ExportError(chosen.name, "cannot express this adapter; nothing was written", refusals)
    if verify and chosen.verify is None:
        raise ExportError(chosen.name, f"there is no way to run {chosen.client} from here", advice="leave out verify")
    if (verify or chosen.needs_sample) and sample is None:
        raise ExportError(chosen.name, "inputs are needed", advice="give example_inputs, as for lora_fx.plan")
    _check_installed(chosen, verify)


def _with_one_used(tuned: nn.Module, chosen: Target) -> nn.Module:
    """Return a twin with the adapter alone that is in use, for a target that writes what the model computes.

    Where not one alone is in use as it was trained, the model itself comes back.
    """
    if chosen.several != "used":
        return tuned
    selections = [switch.now() for switch in switches_in(tuned)]
    names = [name for switch in switches_in(tuned) for name in switch.names]
    used = [pair for selection in selections for pair in selection.weights]
    return only(tuned, used[0][0]) if len(names) > 1 and len(used) == 1 and used[0][1] == 1 else tuned


def _check_adapters(tuned: nn.Module, chosen: Target) -> None:
    """Refuse a choice that the target has to make: among adapters of one weight, or of some in use and some not."""
    if chosen.several not in ("one", "used"):
        return
    one = "name one, adapter=…" if chosen.several == "one" else "use one, lora_fx.use, or name it, adapter=…"
    advice = f"{one}; or fold what is in use: target='merged'"
    if several := at_one_weight(tuned):
        raise ExportError(chosen.name, "has one adapter for each weight", [*several.items()], advice)
    idle = [
        (name, "is not in use as it was trained")
        for switch in switches_in(tuned)
        for name in switch.names
        if len(switch.names) > 1 and switch.now().share(name) != 1
    ]
    if idle:
        raise ExportError(chosen.name, "would write all adapters of the model", idle, advice)


def _check_installed(chosen: Target, verify: bool) -> None:
    needed = [*chosen.needs, *(chosen.verify_needs if verify else ())]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            chosen.name, f"needs {listing(missing)}", advice=f"pip install 'lora-fx[{chosen.extra or 'export'}]'"
        )


def _verified(
    chosen: Target, tuned: nn.Module, stage: Path, path: Path, sample: Sample, options: dict[str, Any]
) -> Exported:
    assert chosen.verify is not None
    with step("running the model"):
        base, adapted = outputs_of_both(tuned, sample)
    effect = largest_difference(chosen.name, adapted, base)
    tolerance = _tolerance(chosen, tuned, [*adapted, *base])
    with step(f"running {chosen.client}", share=3):
        difference = chosen.verify(tuned, stage, sample, **options)
    if not difference <= tolerance:
        raise ExportError(
            chosen.name,
            f"{chosen.client} computes something else; nothing was written",
            [("max |Δ|", f"{difference:.3g}"), ("tolerance", f"{tolerance:.3g}"), ("effect", f"{effect:.3g}")],
        )
    return Exported(chosen.name, path, difference, tolerance, effect)


def _tolerance(chosen: Target, tuned: nn.Module, outputs: Sequence[torch.Tensor]) -> float:
    """Return the target's tolerance for the model's least exact dtype and largest output."""
    dtypes = {parameter.dtype for parameter in tuned.parameters()}
    rounding = max((_ROUNDING.get(dtype, 1.0) for dtype in dtypes), default=1.0)
    largest = max((float(output.abs().max()) for output in outputs if output.numel()), default=1.0)
    return chosen.tolerance * rounding * max(1.0, largest)
