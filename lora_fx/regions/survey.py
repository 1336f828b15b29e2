"""Run a model on samples and see which of its submodules become graphs."""

import contextlib
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_fx.adapters.attach import all_attached
from lora_fx.adapters.selection import acting_everywhere
from lora_fx.capture.calls.ambient import PythonRandomState, RandomState
from lora_fx.capture.calls.objects import tensors_in
from lora_fx.capture.captured import NotCaptured
from lora_fx.capture.symbolic import capture_symbolically
from lora_fx.models.samples import Sample
from lora_fx.models.twin import is_meta, make_twin
from lora_fx.models.walking import devices_of, give_modes, modules_of, set_eval, set_training
from lora_fx.progress.steps import step
from lora_fx.regions.candidates import block_regions, inner_regions, structure_of
from lora_fx.regions.checking import with_noise
from lora_fx.regions.foresight import Foresight
from lora_fx.regions.install import (
    Library,
    called_whole,
    for_one_size,
    in_graphs,
    install,
    library_of,
    regions,
    stock,
    uninstall,
)
from lora_fx.regions.thin import Purpose, ThinLinears
from lora_fx.regions.variants import shrunk, variants

MODES = ((False, False), (True, True))
"""(training, grad mode) of the runs: as in inference, and as in training."""
_EVAL_WITH_GRADIENTS = ((False, True),)


@dataclass(slots=True)
class Survey:
    """What was found out about a model."""

    failures: dict[str, str]
    """Why a submodule does not run as a graph, or not in every mode."""
    library: Library
    structures: dict[str, tuple[Any, ...]]
    """For each region that runs as graphs, the structure of its block."""
    covered: frozenset[str]
    """Paths of the linears that graphs compute."""
    seconds: dict[tuple[Any, ...], float]
    """Time spent capturing and checking, by the structure of the block."""
    foreseen: dict[tuple[Any, ...], Foresight | None] = field(default_factory=dict)
    """What is known of the optimisations of a graph, by the graph and what is adapted in it."""

    @property
    def graphs(self) -> tuple[str, ...]:
        """Paths of the regions that run as graphs."""
        return tuple(self.structures)


def survey(twin: nn.Module, samples: Sequence[Sample], sites: Sequence[str]) -> Survey:
    """Return which submodules of the twin run as graphs for the samples, in eval and in train mode.

    The twin is used up: its buffers change and regions stay installed on it.

    Args:
        twin: a frozen twin of the model to study.
        samples: inputs; every one is run in both modes.
        sites: paths of the weights for whose sake graphs are wanted.

    Raises:
        Exception: whatever the model raises for the samples in eval mode.
    """
    failures: dict[str, str] = {}
    tried = dict.fromkeys(block_regions(twin, sites))
    new = list(tried)
    with step(total=None, share=9):
        while new:
            install(twin, new)
            with step(total=9):
                _learn_sizes(twin, samples)
                _capture(twin, samples)
            smaller = (*_retreat(twin, sites, failures), *_inside_leaves(twin, sites))
            new = [path for path in dict.fromkeys(smaller) if path not in tried]
            tried |= dict.fromkeys(new)
    if not is_meta(twin):
        with checked_hits(twin), step(total=10):
            run_modes(twin, samples, "comparing")
            run_variants(twin, samples, "comparing", share=9)
    structures = {path: structure_of(module) for path, module, _ in regions(twin)}
    seconds = {structures[path]: region.block.seconds for path, _, region in regions(twin)}
    covered = frozenset(in_graphs(twin))
    return Survey(failures, library_of(twin), structures, covered, seconds)


def _capture(twin: nn.Module, samples: Sequence[Sample]) -> None:
    """Let the regions capture the samples' calls: made small, unless the model refuses that or leaves a region out.

    Which it may do for values, so nothing is thin then.
    """
    with step(total=8, share=8):
        if not is_meta(twin):
            with contextlib.suppress(Exception):  # of the model, for a size that the user has not given
                run_modes(twin, [shrunk(sample) for sample in samples], "capturing", share=7)
                if all(region.mine or region.misses for _, _, region in regions(twin)):
                    return
        run_modes(twin, samples, "capturing", purpose=Purpose.SHOW if is_meta(twin) else Purpose.RESULT)


def _learn_sizes(twin: nn.Module, samples: Sequence[Sample]) -> None:
    """Let the regions see which sizes vary before they capture anything."""
    twin_regions = [region for _, _, region in regions(twin)]
    for region in twin_regions:
        region.capturing = False
    made_up = itertools.islice(variants(twin, samples[0]), 1 if is_meta(twin) else None)
    run_modes(twin, (*samples, *made_up), "learning sizes", may_fail=True, modes=MODES[:1])
    for region in twin_regions:
        region.capturing = True
        region.misses.clear()


def _inside_leaves(twin: nn.Module, sites: Sequence[str]) -> list[str]:
    """Return the regions to try inside what graphs call as it is, and inside regions with graphs for one size only."""
    covered = in_graphs(twin)
    open_sites = [site for site in sites if site not in covered]
    leaves = dict.fromkeys((*called_whole(twin), *for_one_size(twin)))
    return [path for leaf in leaves for path in inner_regions(twin, leaf, open_sites)]


def survey_symbolically(twin: nn.Module, sites: Sequence[str]) -> Survey:
    """Return which submodules of the twin run as graphs, found without inputs: straight-line forwards only."""
    library: Library = {}
    structures: dict[str, tuple[Any, ...]] = {}
    failures: dict[str, str] = {}
    waiting = [path for path in block_regions(twin, sites) if path not in sites]
    with step("tracing", None) as doing:
        while waiting:
            path = waiting.pop(0)
            doing.advance(path)
            structure = structure_of(twin.get_submodule(path))
            try:
                if structure not in library:
                    library[structure] = [(capture_symbolically(twin.get_submodule(path)), False)]
                structures[path] = structure
            except NotCaptured as reason:
                failures[path] = str(reason)
                waiting += inner_regions(twin, path, sites)
            waiting = [path for path in waiting if path not in sites]  # nothing shows that a linear alone is called
    install(twin, structures)
    stock(twin, library, structures, {})
    return Survey(failures, library, structures, frozenset(in_graphs(twin)), {})


def _is_inside(path: str, owners: Iterable[str]) -> bool:
    return any(path != owner and path.startswith(f"{owner}." if owner else "") for owner in owners)


def _retreat(twin: nn.Module, sites: Sequence[str], failures: dict[str, str]) -> list[str]:
    """Take off the regions that became no graph; return the smaller ones to try inside them."""
    smaller = []
    for path, module, region in regions(twin):
        if region.block.failures:
            failures[path] = "; ".join(dict.fromkeys(region.block.failures.values()))
        if region.mine:
            continue
        if not region.misses:
            if _is_inside(path, for_one_size(twin)):  # its turn comes when that one is called at another size
                continue
            failures[path] = "never called"
        uninstall(module)
        if region.misses:
            smaller += inner_regions(twin, path, sites)
    return smaller


def prove(twin: nn.Module, samples: Sequence[Sample]) -> None:
    """Let every sample, and what is made up from them, run in eval and in train mode; a model on meta runs nothing."""
    if samples and not is_meta(twin):
        with step(total=4, share=4):
            small = [shrunk(sample) for sample in samples]
            run_modes(twin, small, "proving at small sizes", may_fail=True, purpose=Purpose.PROVE)
            run_variants(twin, samples, "proving", share=2, purpose=Purpose.PROVE)
            run_modes(twin, samples, "proving", purpose=Purpose.PROVE)


def without_gradient(twin: nn.Module, samples: Sequence[Sample]) -> list[str]:
    """Return the sites whose adapter is in use and gets no gradient from anything that the samples give in eval mode.

    One forward and one backward for each sample, until all have one; of samples made small first, since how gradients
    come to an adapter hardly ever depends on sizes.  The twin is used up: its adapters hold noise and gradients.  A
    model that cannot run so, or runs on the meta device, is not judged.
    """
    if is_meta(twin):
        return []
    with_noise(twin)
    used = [(path, one) for path, one in all_attached(twin) if one.spec.record.switch.now().share(one.spec.adapter)]
    waiting = [(path, adapter.lora_B.weight) for path, adapter in used]  # a path may have one a call
    with (
        unchanged_modes(twin),
        unchanged_random(twin),
        warnings.catch_warnings(),
        torch.enable_grad(),
        step("looking for gradients", 2 * len(samples)) as doing,
    ):
        warnings.simplefilter("ignore")
        set_eval(twin)
        for sample, small in (
            *((shrunk(sample), True) for sample in samples),
            *((sample, False) for sample in samples),
        ):
            sends = _sends_gradients(twin, sample, Purpose.FLOW if small else Purpose.RESULT)
            if not sends and not small:
                return []  # a model for inference alone, or outputs on several devices: nothing can be said
            doing.advance()
            waiting = [(path, factor) for path, factor in waiting if factor.grad is None]
            if not waiting:
                break
    return list(dict.fromkeys(path for path, _ in waiting))


def _sends_gradients(twin: nn.Module, sample: Sample, purpose: Purpose) -> bool:
    """Run the sample forward and backward; return whether that can be done."""
    try:
        given = tensors_in(_run(twin, sample, purpose))
        sums = [tensor.float().sum() for tensor in given if tensor.requires_grad]
        if sums:
            torch.stack(sums).sum().backward()  # type: ignore[no-untyped-call]
    except Exception:  # whatever the model raises
        return False
    return True


def run_variants(
    model: nn.Module, samples: Sequence[Sample], what: str, share: float = 1.0, purpose: Purpose = Purpose.SHOW
) -> None:
    """Run what is made up from the samples, in eval and in train mode; what the model refuses does not count.

    `what`, `share` and `purpose` are those of `run_modes`.
    """
    made_up = tuple(variants(model, samples[0]))
    run_modes(model, made_up, f"{what} at other sizes", may_fail=True, share=share, purpose=purpose)
    if any(
        program.captured.dependencies.asks_grad_mode
        for _, _, region in regions(model)
        for program in region.block.programs
    ):
        again = f"{what} with gradients in eval mode"
        run_modes(model, (*samples, *made_up), again, may_fail=True, modes=_EVAL_WITH_GRADIENTS, purpose=purpose)


@contextlib.contextmanager
def checked_hits(model: nn.Module) -> Iterator[None]:
    """Let every call that a graph answers be compared with the forward for a while, in one block of each kind."""
    one_per_block = {id(region.block): region for _, _, region in regions(model)}.values()
    for region in one_per_block:
        region.checking = True
    try:
        yield
    finally:
        for region in one_per_block:
            region.checking = False


def run_modes(
    model: nn.Module,
    samples: Sequence[Sample],
    what: str = "",
    may_fail: bool = False,
    modes: Sequence[tuple[bool, bool]] = MODES,
    share: float = 1.0,
    purpose: Purpose = Purpose.SHOW,
) -> None:
    """Run every sample in every mode; random state and modes are as before afterwards.

    Args:
        model: with regions, or without.
        samples: to run.
        what: that is for, for who waits; and `share`, how much of it this is.
        may_fail: whether a sample that the model refuses does not count.
        modes: (training, grad mode) of the runs.
        purpose: what for; what is not needed for it is not computed.
    """
    blocks = len(regions(model)) or 1
    with (
        unchanged_modes(model),
        unchanged_random(model),
        warnings.catch_warnings(),
        step(what, len(modes) * len(samples) * blocks, "calls of blocks", share, calls=True) as doing,
    ):
        warnings.simplefilter("ignore")  # of the model, about runs that the user has not asked for
        done = 0
        for training, grad in modes:
            set_training(model, training)
            for sample in samples:
                with torch.set_grad_enabled(grad), contextlib.ExitStack() as stack:
                    if training or may_fail:  # some models refuse to train on such a batch; the user will not either
                        stack.enter_context(contextlib.suppress(Exception))
                    _run(model, sample, purpose)
                done += blocks
                doing.reach(done)


def _run(model: nn.Module, sample: Sample, purpose: Purpose) -> Any:
    """Return what a model makes of a sample; but for the purpose of a result, its values may be any.

    Adapters with an invocation act on every token, whatever the sample holds.
    """
    with acting_everywhere():
        if purpose is not Purpose.RESULT:
            with contextlib.suppress(Exception), _thin(model, purpose):  # an error may be for values that nobody needs
                return model(*sample.args, **sample.kwargs)
        return model(*sample.args, **sample.kwargs)


@contextlib.contextmanager
def _thin(model: nn.Module, purpose: Purpose) -> Iterator[None]:
    """Let large linears be thin for a while, but in regions that still learn from the call."""
    inside = [region for _, _, region in regions(model)]
    with ThinLinears(purpose) as thin:
        for region in inside:
            region.thin = thin
        try:
            yield
        finally:
            for region in inside:
                region.thin = None


@contextlib.contextmanager
def trial_twin(model: nn.Module, freeze: bool = True) -> Iterator[nn.Module]:
    """Give a twin of the model to try things on: nothing that happens to it shows in the model, nor in random state.

    Args:
        model: stays unchanged.
        freeze: whether no parameter of the twin requires a gradient; else each keeps its flag.

    Raises:
        RefusedError: the model cannot be copied.
    """
    with unchanged_random(model):
        yield make_twin(model, freeze)


@contextlib.contextmanager
def unchanged_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its training flag back."""
    flags = [(module, module.training) for module in modules_of(model)]
    try:
        yield
    finally:
        give_modes(flags)


@contextlib.contextmanager
def unchanged_random(model: nn.Module) -> Iterator[None]:
    """Give the generators of torch, Python and numpy their state back."""
    state, random_state = RandomState(tuple(devices_of(model))), PythonRandomState()
    try:
        yield
    finally:
        state.restore()
        random_state.restore()
