"""The table of a draft: what multiplies in the model, what it is for, how often it is there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod

from lora_fx.planning.draft.covering import covering, template
from lora_fx.planning.draft.roles import Found
from lora_fx.planning.planned import DEAD
from lora_fx.planning.sites import weight_text
from lora_fx.text import thousands

MOST_ROWS = 40
Row = tuple[str, ...]
Say = Callable[[Found], str]


def table_rows(found: Sequence[Found], sign: Say, note: Say) -> list[Row]:
    """Return (sign, role, name, times, weight, parameters, note), what differs in numbers or in its end only as one.

    Of very many rows those with the most parameters are kept, and the last one tells of the others.

    Args:
        found: the sites.
        sign: what stands first.
        note: what is to be said of a site; empty if nothing is.
    """
    rows = _folded(found, sign, note, lambda one: str(one.site.shape))
    if len(rows) > MOST_ROWS:
        rows = _folded(found, sign, note, lambda one: str(len(one.site.shape)))
    return _largest(rows)


def _folded(found: Sequence[Found], sign: Say, note: Say, shape: Say) -> list[tuple[int, Row]]:
    """Return (parameters, row) for what is alike, its shape in the words of `shape` too."""
    alike: dict[tuple[str, ...], list[Found]] = {}
    for one in found:
        kind = (one.site.classes[0], shape(one))
        alike.setdefault((sign(one), one.role, template(one.site.path), *kind, note(one)), []).append(one)
    siblings: dict[Row, list[list[Found]]] = {}
    for (mark, role, name, *_, why), members in alike.items():
        about = ", ".join(filter(None, (why, _about(members))))
        key = (mark, role, name.rpartition(".")[0], _weight(members), str(len(members)), about)
        siblings.setdefault(key, []).append(members)
    by_template: dict[str, list[str]] = {}
    for one in found:
        by_template.setdefault(template(one.site.path), []).append(one.site.path)
    return [row for key, parts in siblings.items() for row in _rows(key, parts, by_template)]


def _rows(
    key: Row, parts: Sequence[list[Found]], by_template: Mapping[str, Sequence[str]]
) -> Iterator[tuple[int, Row]]:
    """Yield (parameters, row) for siblings: one row if one glob tells them, and nothing else that is alike."""
    mark, role, _, weight, _, about = key
    joined = [one for members in parts for one in members]
    for members in [joined] if len(_names(joined, by_template)) == 1 else parts:
        exact = _names(members, by_template)
        name = exact[0] if len(exact) == 1 else covering([one.site.path for one in members], ())[0]
        size = sum(prod(one.site.shape) for one in members)
        yield size, (mark, role, name, f"×{len(members)}", weight, thousands(size), about)


def _names(members: Sequence[Found], by_template: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    own = {one.site.path: template(one.site.path) for one in members}
    return covering([*own], [path for alike in {*own.values()} for path in by_template[alike] if path not in own])


def _largest(rows: Sequence[tuple[int, Row]]) -> list[Row]:
    if len(rows) <= MOST_ROWS:
        return [row for _, row in rows]
    kept = {at for at, _ in sorted(enumerate(rows), key=lambda pair: -pair[1][0])[: MOST_ROWS - 1]}
    left = sum(size for at, (size, _) in enumerate(rows) if at not in kept)
    number = len(rows) - len(kept)
    last = ("", "", f"… and {thousands(number)} kinds more, all of them smaller", "", "", thousands(left))
    return [*(row for at, (_, row) in enumerate(rows) if at in kept), last]


def _weight(members: Sequence[Found]) -> str:
    """Return `Linear 768 → 3072`, with the least and the most where sizes differ."""
    first = members[0].site
    columns = zip(*(one.site.shape for one in members), strict=True)
    sizes = [str(min(column)) if len(set(column)) == 1 else f"{min(column)}…{max(column)}" for column in columns]
    return weight_text(first.classes[0], sizes, first.is_banked)


def _about(members: Sequence[Found]) -> str:
    """Return what else weights are tied to, and how often they are used where that is not once."""
    ties = list(dict.fromkeys(one.site.tied_to for one in members))
    tied = f"tied to {', '.join(ties[0])}" if len(ties) == 1 and ties[0] else "tied" if any(ties) else ""
    calls = {one.site.calls for one in members} - {None, 1}
    used = DEAD if calls == {0} else f"used {'…'.join(map(str, sorted(filter(None, calls))))} times" if calls else ""
    return ", ".join(filter(None, (tied, used)))
