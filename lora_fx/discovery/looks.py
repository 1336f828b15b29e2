"""What was found out about the models that were looked at last, for `apply` after `plan` and for plans by other rules.

Known by the model itself, weakly, and only for as long as nothing has changed that could make a look at it find
anything else; nothing that is kept here holds the model, its weights or its inputs.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from lora_fx.capture.reads.frozen import Freezer, Frozen, Unfreezable
from lora_fx.capture.reads.sources import ValueSource
from lora_fx.discovery.unchanged import ModelState, state_of
from lora_fx.models.collecting import collected_later
from lora_fx.models.joining import outline
from lora_fx.models.samples import Samples
from lora_fx.models.walking import named_modules_of
from lora_fx.planning.planned import Inventory
from lora_fx.regions.known import KNOWN, keeps_alive
from lora_fx.regions.survey import Survey

MOST_LOOKS = 8
"""Of how many models it is known what was found out."""


@dataclass(slots=True)
class Look:
    """What was found out about one model, with one set of inputs."""

    model: weakref.ref[nn.Module]
    state: ModelState
    inventory: Inventory
    runs: bool
    """Whether the model runs on its inputs here."""
    note: str
    surveys: dict[tuple[str, ...], Survey] = field(default_factory=dict)
    """By the paths of the weights for whose sake graphs were wanted."""

    def survey(self, wanted: Sequence[str]) -> Survey | None:
        """Return which submodules run as graphs, if that was found out, and what the graphs read is as it was."""
        found, model = self.surveys.get(tuple(wanted)), self.model()
        return found if found is not None and model is not None and _still_reads(model, found) else None

    def keep(self, wanted: Sequence[str], found: Survey) -> None:
        """Keep what was found out, unless it holds on to a model or to values."""
        graphs = [captured for known in found.library.values() for captured, _ in known]
        if KNOWN.holds(graphs) or not keeps_alive(found):
            self.surveys[tuple(wanted)] = found


class Looks:
    """The last looks at models; threads may share it."""

    def __init__(self, most: int = MOST_LOOKS) -> None:
        self._most = most
        self._looks: OrderedDict[int, Look] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._looks)

    def limit(self, models: int) -> None:
        """Keep what is known of at most so many models from now on; 0 keeps none."""
        with self._lock:
            self._most = models
            self._shrink()

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._looks.clear()

    def state(self, model: nn.Module, tried: Samples) -> ModelState | None:
        """Return the state by which a look at a model can be known again; None where there is none."""
        if not self._most or outline(model) is not model:
            return None
        calls = [(sample.args, sample.kwargs) for sample in tried.items]
        with collected_later():
            return state_of(model, calls if tried.given and not tried.on_meta else (), calls)

    def of(self, model: nn.Module, state: ModelState) -> Look | None:
        """Return what was found out about the model in this state."""
        with self._lock:
            look = self._looks.get(id(model))
        return look if look is not None and look.model() is model and look.state.still(state) else None

    def learn(self, model: nn.Module, state: ModelState, inventory: Inventory, runs: bool, note: str) -> Look:
        """Return what was found out about the model, and keep it in the place of what was known."""
        key = id(model)
        look = Look(weakref.ref(model, lambda _: self._looks.pop(key, None)), state, inventory, runs, note)
        with self._lock:
            self._looks.pop(key, None)
            self._looks[key] = look
            self._shrink()
        return look

    def _shrink(self) -> None:
        while len(self._looks) > self._most:
            self._looks.popitem(last=False)


LOOKS = Looks()
"""Of this process."""


def _still_reads(model: nn.Module, found: Survey) -> bool:
    """Whether globals, closures, defaults, switches and the environment are what the graphs were captured with."""
    first = {structure: path for path, structure in reversed(found.structures.items())}
    for structure, path in first.items():
        freezer = Freezer({id(child): name for name, child in named_modules_of(model.get_submodule(path))})
        read: dict[ValueSource, Frozen] = {}
        for captured, _ in found.library.get(structure, ()):
            read |= captured.dependencies.outside
        if not all(_is_still(source, frozen, freezer) for source, frozen in read.items()):
            return False
    return True


def _is_still(source: ValueSource, frozen: Frozen, freezer: Freezer) -> bool:
    try:
        return freezer.freeze(source.value()) == frozen
    except Unfreezable:
        return False
