"""save: an adapted model → a directory in PEFT's format, whole or not at all."""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from lora_fx.adapters.adapt import trained_parameters
from lora_fx.adapters.attach import all_attached, with_values
from lora_fx.adapters.placed import base_in, is_trained, placed_in
from lora_fx.adapters.trained import added_tensors
from lora_fx.errors import AdapterFileError, LoraFxWarning
from lora_fx.files.adapter.describe import Described, describe
from lora_fx.files.adapter.folder import folder_of, replace_files
from lora_fx.files.adapter.names import CONFIG_FILE, WEIGHTS_FILE
from lora_fx.files.values import canonical_safetensors
from lora_fx.models.between import unchanged
from lora_fx.models.fsdp import resharded
from lora_fx.models.shards import by_first, is_sharded, processes_of
from lora_fx.models.tensors import get_tensor
from lora_fx.models.wrappers import seen_through, without_wrappers
from lora_fx.models.zero import is_partitioned
from lora_fx.text import listing
from lora_fx.tuned.build import trainable


def save(tuned: nn.Module, directory: str | os.PathLike[str], adapter: str | None = None) -> None:
    """Write the model's adapters, or one of them, in PEFT's format; the model stays unchanged.

    `adapter_config.json` and `adapter_model.safetensors` are complete or not there at all, and equal adapters are equal
    bytes.  Existing files are replaced together: after a kill the directory holds the old adapter or the new one, or
    none that PEFT finds.  Other files of the directory stay.  Of several adapters the first (`default`, or by name)
    stands in the directory itself, the others in directories of their names.  What is in use (`lora_fx.use`) is not
    written.  Where FSDP2 shards the model every process calls this: all gather the adapters, one tensor at a time, the
    first writes, and all come back when the files are there.

    Args:
        tuned: an adapted model.
        directory: is made if it is missing.
        adapter: name of the only one to write; None writes all.

    Raises:
        ValueError: no adapter has the name.
        RefusedError: the model is not adapted; or another adapter's rules train biases of the model itself.
        AdapterFileError: the directory cannot be written, or the adapter has no values; on every process.
    """
    given, folder = resharded(seen_through(tuned)), folder_of(directory)
    _refuse_partitioned(given, folder)
    tuned = with_values(given)
    whole = ((name, get_tensor(tuned, name)) for name in trained_parameters(tuned))
    factors = ((path, p) for path, adapter in all_attached(tuned) for p in adapter.parameters())
    lost = dict.fromkeys(name for name, tensor in (*factors, *whole) if tensor is not None and tensor.is_meta)
    if lost:
        facts = [(name, "has no values") for name in [*lost][:8]]
        raise AdapterFileError(str(folder), "the adapter is on the meta device and has no values to save", facts)
    with unchanged(given):  # until all is written: what is described shares the model's memory
        described = describe(tuned, adapter)
        _warn_of_moved_buffers(tuned)

        def write() -> None:
            files: dict[Path, bytes] = {}
            for one in described:
                files |= files_of(one, Path() if one is described[0] else Path(one.name))
            write_adapter(folder, files)

        by_one_process(given, write)


def by_one_process(tuned: nn.Module, write: Callable[[], None]) -> None:
    """Let one of the processes write that hold parts of what an adapted model trains; the others wait for it."""
    shared = max(filter(is_sharded, trainable(tuned)), key=processes_of, default=None)  # some are on a part of a mesh
    if shared is None:
        write()
    else:
        by_first(shared, write)


def write_adapter(folder: Path, files: Mapping[Path, bytes]) -> None:
    """Write files of adapters, by their path in a folder, together.

    Raises:
        AdapterFileError: the folder cannot be written.
    """
    try:
        replace_files(folder, files)
    except (OSError, ValueError) as error:  # ValueError: of a path that no file can have
        reason = error.strerror if isinstance(error, OSError) else None
        raise AdapterFileError(str(folder), f"cannot be written: {reason or error}") from error


def _refuse_partitioned(tuned: nn.Module, folder: Path) -> None:
    """ZeRO-3 leaves each process an empty tensor where a parameter was: the file would hold nothing."""
    empty = [(path, "[0]") for path, adapter in all_attached(tuned) for p in adapter.parameters() if p.numel() == 0]
    whole = ((name, get_tensor(tuned, name)) for name in trained_parameters(tuned))
    empty += [(name, "[0]") for name, tensor in whole if tensor is not None and is_partitioned(tensor)]
    empty += [(name, "[0]") for name, _, value in added_tensors(tuned) if is_partitioned(value)]
    empty = list(dict.fromkeys(empty))
    if empty:
        advice = "gather them (deepspeed.zero.GatheredParameters), or save_pretrained with a gathered state_dict"
        raise AdapterFileError(
            str(folder), "the adapter is partitioned, and this process does not hold it", empty, advice
        )


def _warn_of_moved_buffers(tuned: nn.Module) -> None:
    """Running statistics that training has moved belong to no adapter: a model that loads it has those of the base."""
    places = placed_in(tuned)
    base = {without_wrappers(name): tensor for name, tensor in base_in(places).items()}
    outside = [(without_wrappers(name), b) for name, b in tuned.named_buffers() if not is_trained(name, places)]
    known = [(name, buffer) for name, buffer in outside if name in base and not base[name].is_meta]
    moved = [name for name, buffer in known if not torch.equal(buffer, base[name])]
    if moved:
        warnings.warn(
            f"training has changed {listing(moved)}, which the adapter does not hold; "
            "keep them with it by `train:`, or train with those modules in eval mode",
            LoraFxWarning,
            stacklevel=4,
        )


def files_of(described: Described, folder: Path) -> dict[Path, bytes]:
    """Return the contents of an adapter's files, by path."""
    config = json.dumps(described.config, indent=2, sort_keys=True) + "\n"
    return {
        folder / WEIGHTS_FILE: canonical_safetensors(described.tensors, described.metadata),
        folder / CONFIG_FILE: config.encode(),
    }
