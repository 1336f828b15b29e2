"""Biases that an adapter trains beside those of its own sites, in files: PEFT's `bias="all"`."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from lora_fx.adapters.attach import Attached, owner_path
from lora_fx.files.adapter.names import other_bias_key
from lora_fx.files.adapter.read import AdapterFile
from lora_fx.models.wrappers import without_wrappers
from lora_fx.planning.beside import BIAS_ALL
from lora_fx.planning.planned import TrainedModule
from lora_fx.text import dotted


def biases_by_key(values: Mapping[str, Tensor], adapters: Iterable[tuple[str, Attached]]) -> dict[str, Tensor]:
    """Return biases by the keys of a file.

    Args:
        values: by the names of the parameters, without wrappers.
        adapters: (path without wrappers, adapter) of the sites that the file has; of a raw parameter its own name.
    """
    layers = Counter(owner for owner, _ in {(owner_path(path, one), one.spec.parameter) for path, one in adapters})
    return {other_bias_key(name, layers): value for name, value in values.items()}


def at_hand(name: str, modules: Mapping[str, str]) -> str:
    """Return the model's name of a parameter; `modules` are the model's names by those without wrappers."""
    path, _, last = name.rpartition(".")
    return dotted(modules[path], last)


def planned_biases(file: AdapterFile, modules: Mapping[str, str]) -> Iterator[TrainedModule]:
    """Yield the biases that a file has beside those of its sites, as a plan has them."""
    where = f"{file.folder.name}: {BIAS_ALL}"
    yield from (TrainedModule(at_hand(name, modules), value.numel(), where) for name, value in file.biases.items())


def bias_mismatches(file: AdapterFile, model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield how the biases of a file do not fit those of a model."""
    if not file.biases:
        return
    own = {without_wrappers(name): tensor for name, tensor in model.named_parameters(remove_duplicate=False)}
    for name, tensor in file.biases.items():
        if name not in own:
            yield name, "a bias", "has no such parameter"
        elif own[name].shape != tensor.shape:
            yield name, str(list(tensor.shape)), str(list(own[name].shape))
