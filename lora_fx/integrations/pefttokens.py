"""PEFT's `trainable_token_indices` → entries under `tokens:`."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from lora_fx.discovery.tables import tables_in
from lora_fx.errors import RefusedError
from lora_fx.files.adapter.configuration import Configuration
from lora_fx.files.adapter.tokens import ROWS, ties_it
from lora_fx.models.ties import input_embeddings
from lora_fx.rules.patterns import glob_of
from lora_fx.text import listing

_USUAL = "embed_tokens"
"""What PEFT takes for the input embeddings of a model that does not say which they are."""


def entries_by_name(config: Configuration) -> list[dict[str, Any]] | None:
    """Return what rules have under `tokens`, by names alone; None where they are those of the model's inputs."""
    if isinstance(config.token_rows, tuple):
        return None if config.token_rows else []
    return [_entry(f"**.*{glob_of(name)}", ids) for name, ids in config.token_rows.items() if ids]


def entries_for(config: Configuration, model: nn.Module) -> list[dict[str, Any]]:
    """Return what rules have under `tokens`, each embedding by its path.

    Raises:
        RefusedError: rows of what is no embedding; rows that PEFT does not give to all that is tied to them.
    """
    tables = {path: table for table in tables_in(model) for path in table.paths}
    found: dict[str, tuple[int, ...]] = {}
    problems: list[tuple[str, str]] = []
    for path, ids in _targets(config, model):
        table = tables.get(path)
        if table is None:
            problems.append((path, "is no embedding; its rows are trained with those of the embedding it is tied to"))
        elif table.tied and not ties_it(model, path):
            problems.append((path, f"PEFT would not give its rows to {listing(table.tied)}, to which it is tied"))
        else:
            found.setdefault(table.path, ids)
    if problems:
        raise RefusedError("the configuration asks for what no rule can say", [(ROWS, why) for why in _told(problems)])
    return [_entry(glob_of(path), ids) for path, ids in found.items()]


def _told(problems: list[tuple[str, str]]) -> Iterator[str]:
    return (f"{path}: {why}" for path, why in dict.fromkeys(problems))


def _targets(config: Configuration, model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (path, ids) of the modules that PEFT would train rows of; the first name that means a module counts."""
    rows = config.token_rows
    if isinstance(rows, tuple):
        inputs = input_embeddings(model) if rows else None
        own = next((path for path, module in model.named_modules() if module is inputs), _USUAL)
        rows = {own: rows} if rows else {}
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    for name, ids in rows.items():
        yield from ((path, ids) for path in paths if path.endswith(name) and ids)


def _entry(name: str, ids: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "ids": sorted({*ids})}
