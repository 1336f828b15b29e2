"""The text of a draft: a rule file in which the usual choice is active and the others stand ready as comments."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_fx.errors import RefusedError
from lora_fx.planning.draft.choices import Ground, Offer, active, beside, instead, rank_of, trained_whole
from lora_fx.planning.draft.costs import Stored, cost, decided
from lora_fx.planning.draft.roles import Found
from lora_fx.planning.draft.rows import table_rows
from lora_fx.planning.planned import Inventory
from lora_fx.rules.writing import printable, quoted, rule_lines
from lora_fx.text import columns, count, thousands, wrapped

_WIDTH = 112
_HEAD = """\
Drafted by `lora-fx init`.  The first rule that matches a weight decides it; `lora-fx plan MODEL FILE` shows
what becomes of each.  Lines with ## are remarks; those with one # can be switched on: take "# " away.
"""
_OPTIONS = (
    ("dropout: 0.05", "on the adapter's input, while training"),
    ("rslora: true", "scales by alpha / √r instead of alpha / r"),
)


def drafted(inventory: Inventory, norms: Sequence[str], stored: Stored, note: str = "", kind: str = "") -> str:
    """Return the text of a rule file for a model; the same text for the same model.

    Args:
        inventory: what the model has.
        norms: paths of its normalisations, which may be trained whole.
        stored: tells how many numbers the factors of a site have in a file.
        note: what keeps the inventory from being complete.
        kind: the type of a transformers model, such as `llama`, for which PEFT may have a choice of its own.

    Raises:
        RefusedError: nothing in the model can be adapted; says why of each weight.
    """
    ground = Ground(inventory, kind)
    chosen = active(ground)
    if chosen is None:
        refusals = [(one.site.path, one.site.refusal or "has no rows or no columns") for one in ground.found]
        what = "weight that can be adapted" if refusals else "weight that multiplies an activation"
        raise RefusedError(f"{inventory.model} has no {what}", refusals, "there is nothing to write rules for")
    lines = [
        *_remarks(f"Rules for {inventory.model}, {count(inventory.total, 'parameter')}."),
        *(f"## {line}" for line in _HEAD.splitlines()),
        *(_remarks(f"Note: {note}") if note else ()),
        *_tables(ground, chosen),
        "",
        "version: 1",
        "rules:",
        *_active(ground, chosen, stored),
        *_offered(ground, chosen, stored),
        *_trained(ground, norms),
    ]
    return "\n".join(lines) + "\n"


def _remarks(text: str, indent: str = "") -> Iterator[str]:
    """Yield a text, which may hold names of the model, as remarks."""
    return (f"{indent}## {line.strip()}" for line in wrapped(printable(text), _WIDTH).splitlines())


def _tables(ground: Ground, chosen: Offer) -> Iterator[str]:
    """Yield what multiplies in the model, and what of it cannot be adapted."""
    adapted, rank = {one.site.path for one in chosen.sites}, rank_of(chosen)
    roles = {one.role for one in chosen.sites}

    def note(one: Found) -> str:
        is_left = one.role in roles and one.narrow < rank
        return one.site.refusal or (f"narrower than r = {rank}" if is_left else "")

    usable, paths = ground.usable, {one.site.path for one in ground.usable}
    refused = [one for one in ground.found if one.site.path not in paths]
    yield from _table(
        "What multiplies in it; + has an adapter by the rule below, · has none:",
        table_rows(usable, lambda one: "+" if one.site.path in adapted else "·", note),
    )
    if refused:
        yield from _table("What cannot be adapted, and why:", table_rows(refused, lambda _: "!", note))


def _table(title: str, rows: Sequence[Sequence[str]]) -> Iterator[str]:
    shown = [tuple(map(printable, row)) for row in rows]
    yield from ("##", f"## {title}", *(f"## {line}" for line in columns(shown).splitlines()))


def _active(ground: Ground, chosen: Offer, stored: Stored) -> Iterator[str]:
    """Yield the rule that is switched on, with what can be added to it."""
    (rule,) = chosen.rules
    yield from _said(chosen, ground, stored)
    yield from (f"  {line}" for line in rule_lines(rule))
    for option, about in (*_OPTIONS, *_dora(ground, rule)):
        yield f"      # {option}  ## {about}"
    yield f"    # expect: {len(chosen.sites)}  ## any other number of weights is an error then"


def _dora(ground: Ground, rule: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the line that makes a rule DoRA's, where any of its sites can have that."""
    with_dora = decided([{**rule, "lora": {**rule["lora"], "dora": True}}], ground.inventory)
    if with_dora.adapted:
        only = f"; {count(len(with_dora.refused), 'site')} cannot have it" if with_dora.refused else ""
        yield "dora: true", f"a magnitude for each output too: {thousands(with_dora.trainable)} parameters in all{only}"


def _said(choice: Offer, ground: Ground, stored: Stored) -> Iterator[str]:
    yield from _remarks(choice.about, "  ")
    same_rows = all(one.role not in ("experts", "convolution", "embedding") for one in choice.sites)
    yield from _remarks(cost(decided(choice.rules, ground.inventory), stored, same_rows), "  ")


def _offered(ground: Ground, chosen: Offer, stored: Stored) -> Iterator[str]:
    """Yield the rules that are switched off."""
    name = chosen.rules[0]["name"]
    parts = (
        (f"In place of `{name}`: switch one of these on, and that rule off.", list(instead(ground, chosen))),
        (f"Beside `{name}`.", list(beside(ground, chosen))),
    )
    for title, choices in parts:
        if choices:
            yield from ("", f"  ## ---- {title}")
        for choice in choices:
            yield ""
            yield from _said(choice, ground, stored)
            yield from (f"  # {line}" for rule in choice.rules for line in rule_lines(rule))


def _trained(ground: Ground, norms: Sequence[str]) -> Iterator[str]:
    """Yield the modules that may be trained whole, switched off."""
    parts = list(trained_whole(ground, norms))
    if parts:
        yield from ("", "## ---- Modules that are trained whole, and saved with the adapter.", "", "# train:")
    for about, globs, size in parts:
        yield f"## {about}: {count(size, 'parameter')}."
        yield from (f"#   - {quoted(glob)}" for glob in globs)
