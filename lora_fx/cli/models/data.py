"""--data on the command line: batches of a model's inputs, out of a file of tensors or from a factory."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_fx.api import load
from lora_fx.cli.models.pretrained import ModelSpecError
from lora_fx.cli.models.spec import called, load_model
from lora_fx.errors import RefusedError
from lora_fx.files.covariances import input_covariances
from lora_fx.files.safetensors import read_raw
from lora_fx.files.values import READ, read_tensors
from lora_fx.models.samples import samples_of
from lora_fx.sources.regular import UnreadableError
from lora_fx.text import columns

FORMS = "a .safetensors file, package.module:factory or file.py:factory"
_BATCHES = 8


def batches_of(spec: str) -> list[object]:
    """Return batches of inputs for what the user wrote as --data.

    The tensors of a `.safetensors` file are the model's keyword arguments, with as many rows each, of which eight
    batches are made, or as many as there are rows.  `package.module:factory` and `file.py:factory` execute that
    code; the factory is called without arguments and returns batches, each as `example_inputs` of `plan`.

    Raises:
        ModelSpecError: says what is wrong with the text, the file, or what the factory returned.
        MergeError: the file is no safetensors file.
        CaptureError: a batch is of a type that stands for no inputs.
    """
    if spec.endswith(".safetensors"):
        return _of_file(Path(spec))
    home, _, name = spec.rpartition(":")
    if not home or not name:
        raise ModelSpecError(f"--data {spec}: give {FORMS}")
    made = called(home, name)
    try:
        batches = list(made)
    except TypeError:
        raise ModelSpecError(f"--data {spec} gives an object of type {type(made).__name__}, not batches") from None
    return [sample for batch in batches for sample in samples_of(batch, f"a batch of {spec}")]


def _of_file(path: Path) -> list[object]:
    file = read_raw(path)
    if other := [f"{name} is of {entry.dtype}" for name, entry in file.tensors.items() if entry.dtype not in READ]:
        raise ModelSpecError(f"--data {path}: {'; '.join(other)}, of which torch makes no inputs")
    try:
        # copies: the file may change after this
        tensors = {name: tensor.clone() for name, tensor in read_tensors(file).items()}
    except (OSError, UnreadableError) as error:
        raise ModelSpecError(f"--data {path}: cannot be read: {error}") from error
    rows = {name: len(tensor) if tensor.dim() else 0 for name, tensor in tensors.items()}
    if len(set(rows.values())) != 1 or min(rows.values()) < 2:
        found = columns([(name, str(list(tensor.shape))) for name, tensor in sorted(tensors.items())]) or "  no tensors"
        raise ModelSpecError(
            f"--data {path}: wants the model's arguments, with two rows or more, as many in each\n{found}"
        )
    size = -(-min(rows.values()) // _BATCHES)
    parts: dict[str, Sequence[Tensor]] = {name: torch.split(tensor, size) for name, tensor in tensors.items()}
    return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)]


@contextlib.contextmanager
def covariances_on(
    data: str, base: str, adapters: Sequence[str], name: str | None, progress: bool | None
) -> Iterator[Path]:
    """Give a file, for a while, of what a checkpoint's adapted layers are given on data; the model is in memory for it.

    Args:
        data: as for `batches_of`.
        base: directory of a model of transformers.
        adapters: one directory.
        name: of the adapter to merge, where the directory has several.
        progress: as for `plan`.

    Raises:
        RefusedError: several directories.
        ModelSpecError: as `load_model` and `batches_of`.
    """
    if len(adapters) != 1:
        facts = [("directories", ", ".join(adapters))]
        advice = "lora_fx.input_covariances(tuned, batches, FILE) with all of them in use, and --covariances FILE"
        raise RefusedError("--data takes one directory of adapters", facts, advice)
    batches = batches_of(data)
    model, _ = load_model(f"hf:{base}", weights=True)
    tuned = load(model, adapters[0], progress=progress)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "inputs")
        input_covariances(tuned, batches, file, adapters=name, progress=progress)
        yield file
