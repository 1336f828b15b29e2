"""What rules train beside A and B: modules as a whole, single biases, rows of embeddings.  Pure data; no torch here."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from lora_fx.errors import RefusedError
from lora_fx.planning.planned import EmbeddingTable, Inventory, PlannedSite, TrainedModule, TrainedRows
from lora_fx.rules.ruleset import RuleSet, TokenRule, TrainPattern
from lora_fx.text import listing, shortened

BIAS_ALL = "bias: all"
TOKENS = "tokens"


def trained_modules(patterns: Sequence[TrainPattern], inventory: Inventory) -> tuple[TrainedModule, ...]:
    """Return the modules under `train:`, without those that lie in another of them: no parameter counts twice."""
    modules: dict[str, TrainedModule] = {}
    for pattern in patterns:
        for path, size in modules_of(pattern, inventory):
            modules.setdefault(path, TrainedModule(path, size, pattern.pattern.text))
    inside = tuple(f"{path}." for path in modules)
    return tuple(module for path, module in modules.items() if not path.startswith(inside))


def modules_of(pattern: TrainPattern, inventory: Inventory) -> list[tuple[str, int]]:
    """Return (path, number of parameters) of the modules that a pattern under `train:` means."""
    return [(path, size) for path, size in inventory.modules if path and pattern.pattern.matches(path)]


def tables_of(rule: TokenRule, inventory: Inventory) -> list[EmbeddingTable]:
    """Return the embeddings that an entry under `tokens:` means."""
    return [
        table for table in inventory.tables if any(pattern.matches(p) for pattern in rule.name for p in table.paths)
    ]


def trained_biases(
    rules: RuleSet, inventory: Inventory, sites: Sequence[PlannedSite], trained: Sequence[TrainedModule]
) -> tuple[TrainedModule, ...]:
    """Return the biases that `bias: all` trains beside those of adapted sites; each under its own name.

    Raises:
        RefusedError: one of them is adapted as a weight.
    """
    if not rules.all_biases:
        return ()
    adapted = [planned for planned in sites if planned.decision == "adapt"]
    own = {f"{path}.bias" for planned in adapted if planned.site.bias for path in planned.site.paths}
    inside = tuple(f"{module.path}." for module in trained)
    found = {
        name: TrainedModule(name, size, BIAS_ALL)
        for name, size in inventory.biases
        if name not in own and not name.startswith(inside)
    }
    if both := [(planned.path, "is a bias") for planned in adapted if planned.site.weight in found]:
        raise RefusedError("`bias: all` trains these whole, and rules adapt them", both, "leave them out of the rules")
    return tuple(found.values())


def trained_rows(
    rules: RuleSet, inventory: Inventory, sites: Sequence[PlannedSite], trained: Sequence[TrainedModule]
) -> tuple[TrainedRows, ...]:
    """Return the rows under `tokens:`, of each embedding and of every weight that is tied to it.

    Raises:
        RefusedError: naming every embedding that cannot have them, and why; or the adapter that they belong to.
    """
    adapters = list(dict.fromkeys(site.lora.adapter for site in sites if site.lora is not None))
    weights = {planned.site.weight: planned for planned in sites if planned.decision == "adapt"}
    found: dict[tuple[str, str], TrainedRows] = {}
    problems: list[tuple[str, str]] = []
    for rule in rules.tokens:
        adapter = rule.adapter or (adapters[0] if len(adapters) == 1 else "")
        for table in tables_of(rule, inventory):
            problems += _problems(table, rule.ids, weights, trained)
            if adapter not in adapters:
                problems.append((table.path, _whose(rule.adapter, adapters)))
            if (table.weight, adapter) in found:
                problems.append((table.path, "is meant by several entries: write their ids into one"))
            for rows in rows_of(table, rule.ids, adapter, TOKENS):
                found[rows.weight, adapter] = rows
    if problems:
        raise RefusedError("rows of these embeddings cannot be trained as `tokens` says", list(dict.fromkeys(problems)))
    return tuple(found.values())


def rows_of(table: EmbeddingTable, ids: tuple[int, ...], adapter: str, pattern: str) -> Iterator[TrainedRows]:
    """Yield the rows of an embedding, and the same rows of every weight that is tied to it."""
    first = TrainedRows(table.weight, ids, len(ids) * table.width, adapter, pattern)
    yield first
    yield from (replace(first, weight=name, parameters=0, tied_to=table.weight) for name in table.tied)


def _whose(named: str, adapters: Sequence[str]) -> str:
    known = listing(adapters) or "none"
    if named:
        return f"adapter: {shortened(named)} is none of the rules', which have {known}"
    return f"does not say whose its rows are: `adapter:` one of {known}"


def _problems(
    table: EmbeddingTable, ids: Sequence[int], adapted: Mapping[str, PlannedSite], trained: Iterable[TrainedModule]
) -> Iterator[tuple[str, str]]:
    """Yield why an embedding cannot have these rows trained alone."""
    names = (table.weight, *table.tied)
    if table.refusal:
        yield table.path, table.refusal
    if beyond := [str(row) for row in ids if row >= table.rows]:
        yield table.path, f"has {table.rows} rows, and not {listing(beyond)}"
    if table.padding in ids and not table.tied:
        yield table.path, f"row {table.padding} is its padding_idx, which gets no gradient"
    for name in names:
        if name in adapted:
            yield adapted[name].path, "has an adapter, which changes all of its rows"
        if any(name.startswith(f"{module.path}.") for module in trained):
            yield name, "is trained whole (`train:`)"
