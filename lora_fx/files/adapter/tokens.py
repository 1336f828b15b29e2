"""Rows of embeddings that are trained alone, in files: PEFT's `trainable_token_indices`.

PEFT puts a layer of its own around each module that it is given, reads the base's weight there, and copies the rows
into it.  What a transformers model declares as tied to its input embeddings gets them too, without a tensor of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_fx.adapters.tokenrows import TokenRows
from lora_fx.adapters.trained import added_rows
from lora_fx.errors import RefusedError
from lora_fx.files.adapter.biases import at_hand
from lora_fx.files.adapter.names import begins_in, rows_key
from lora_fx.files.adapter.read import AdapterFile
from lora_fx.models.swap import original_class
from lora_fx.models.ties import input_embeddings, says_tied
from lora_fx.models.wrappers import module_at, without_wrappers
from lora_fx.planning.planned import EmbeddingTable, TrainedRows
from lora_fx.text import listing
from lora_fx.tuned.several import rows_with

Mismatch = tuple[str, str, str]
ROWS = "trainable_token_indices"
_WEIGHT = ".weight"


# -- written


@dataclass(frozen=True, slots=True)
class SavedRows:
    """What is written of the rows that one adapter trains."""

    tensors: dict[str, Tensor]
    """By the keys of the file."""
    indices: dict[str, list[int]]
    """The ids by the path of each module that has a tensor."""
    tied: dict[str, str]
    """Names of weights that have the rows of another one, by their own name."""
    beyond: tuple[tuple[str, str], ...]
    """(path, reason) where PEFT would compute something else with them."""


def saved_rows(tuned: nn.Module, adapter: str) -> SavedRows:
    """Return what is written of the rows that an adapter of the model trains; the model stays unchanged."""
    values = {(name, whose): rows for name, whose, rows in added_rows(tuned)}
    tensors: dict[str, Tensor] = {}
    indices: dict[str, list[int]] = {}
    tied: dict[str, str] = {}
    beyond: list[tuple[str, str]] = []
    for planned in rows_with(tuned, adapter):
        name, source = without_wrappers(planned.weight), without_wrappers(planned.tied_to)
        path = name.removesuffix(_WEIGHT)
        if planned.tied_to:
            tied[name] = source
        if planned.tied_to and ties_it(tuned, source.removesuffix(_WEIGHT)):
            beyond += _unlike_peft(tuned, path)
            continue
        if not name.endswith(_WEIGHT):
            beyond.append((name, "PEFT has rows of modules with a `weight`, and would leave it as it is"))
            continue
        beyond += (*_unlike_peft(tuned, path), *_claimed_too(tuned, path))
        tensors[rows_key(path)] = values[planned.weight, adapter].rows
        indices[path] = list(planned.ids)
    return SavedRows(tensors, indices, tied, tuple(beyond))


def ties_it(model: nn.Module, path: str) -> bool:
    """Whether PEFT gives the rows of an embedding to all that the model declares as tied to it."""
    flag = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return bool(flag) and input_embeddings(model) is module_at(model, path)


def _unlike_peft(model: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    """Yield why PEFT would compute something else with rows of a module's weight."""
    module = module_at(model, path)
    forward = original_class(module).forward
    if isinstance(module, nn.Embedding):
        if forward is not nn.Embedding.forward and getattr(module, "embed_scale", None) is None:
            yield path, "its class has a forward of its own, which PEFT would leave out"
        if ties_it(model, path) and says_tied(model):
            yield path, "PEFT would give the rows to what the model declares as tied to it, and is not"
    elif forward is not nn.Linear.forward:
        yield path, "PEFT has rows of embeddings and linears only"
    elif module.bias is not None:
        yield path, "PEFT would leave out its bias"


def _claimed_too(model: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    names = dict.fromkeys(without_wrappers(name) for name, _ in model.named_modules(remove_duplicate=False))
    if others := [name for name in names if name.endswith(path) and name != path]:
        yield path, f"PEFT would take {listing(others)} for it, whose name ends so"


# -- read


def with_ties(file: AdapterFile, model: nn.Module) -> AdapterFile:
    """Return a file of PEFT's with what PEFT ties to the embeddings of which it has rows.

    Raises:
        RefusedError: PEFT computes something else with the rows than their weight shows.
    """
    own = {without_wrappers(name): tensor for name, tensor in model.named_parameters(remove_duplicate=False)}
    paths = {without_wrappers(path) for path, _ in model.named_modules()}
    ties: dict[str, str] = {}
    for path in file.rows:
        weight = path + _WEIGHT
        if path in paths and weight in own and ties_it(model, path):
            ties |= {name: weight for name, tensor in own.items() if tensor is own[weight] and name != weight}
    explicit = {path + _WEIGHT for path in file.rows}
    ties = {name: source for name, source in ties.items() if name not in explicit}
    known = [path for path in (*file.rows, *(name.removesuffix(_WEIGHT) for name in ties)) if path in paths]
    if unlike := [fact for path in known for fact in _unlike_peft(model, path)]:
        raise RefusedError("PEFT computes something else with these rows than their weight shows", unlike)
    return replace(file, ties=ties)


def row_mismatches(file: AdapterFile, model: nn.Module, tables: Sequence[EmbeddingTable]) -> Iterator[Mismatch]:
    """Yield how the rows of a file do not fit the weights of a model."""
    if not file.rows:
        return
    own = {without_wrappers(name): tensor for name, tensor in model.named_parameters(remove_duplicate=False)}
    refused = {without_wrappers(name): table.refusal for table in tables for name in (table.weight, *table.tied)}
    for path, (ids, rows) in file.rows.items():
        name = path + _WEIGHT
        given = f"{len(ids)} rows of {list(rows.shape[1:])}, up to {max(ids, default=0)}"
        if name not in own:
            yield name, given, "has no such tensor"
        elif own[name].dim() != rows.dim() or own[name].shape[1:] != rows.shape[1:]:
            yield name, given, str(list(own[name].shape))
        elif max(ids, default=0) >= own[name].shape[0]:
            yield name, given, f"{list(own[name].shape)}; resize_token_embeddings makes room for added tokens"
        elif refused.get(name):
            yield name, given, refused[name]
        elif begins_in(name, frozenset(file.header.trained)):
            yield name, given, "is trained whole by the same file"
    for name, source in file.ties.items():
        if source in own and own.get(name) is not own[source]:
            yield name, f"tied to {source}", "is not" if name in own else "has no such tensor"


def planned_rows(file: AdapterFile, adapter: str, modules: Mapping[str, str]) -> Iterator[TrainedRows]:
    """Yield the rows that a file has, as a plan has them.

    Args:
        file: fits the model.
        adapter: whose they are.
        modules: the names of the model's modules, by those without wrappers.
    """

    where = f"{file.folder.name}: {ROWS}"
    for path, (ids, rows) in file.rows.items():
        yield TrainedRows(at_hand(path + _WEIGHT, modules), ids, rows.numel(), adapter, where)
    for name, source in file.ties.items():
        ids = file.rows[source.removesuffix(_WEIGHT)][0]
        yield TrainedRows(at_hand(name, modules), ids, 0, adapter, where, at_hand(source, modules))


def fill_rows(tuned: nn.Module, file: AdapterFile, adapter: str) -> None:
    """Copy the rows of a file into those of an adapter, in place."""
    values: dict[str, TokenRows] = {
        without_wrappers(name): rows for name, whose, rows in added_rows(tuned) if whose == adapter
    }
    with torch.no_grad():
        for path, (_, rows) in file.rows.items():
            values[path + _WEIGHT].rows.copy_(rows)


def misfitting_rows(file: AdapterFile, weights: Mapping[str, str]) -> Iterator[Mismatch]:
    """Yield the adapted sites of a file of whose weight it has rows too; `weights` are those of its sites, by path."""
    names = {*(path + _WEIGHT for path in file.rows), *file.ties}
    yield from ((path, "is adapted", "rows of it are trained") for path, name in weights.items() if name in names)
