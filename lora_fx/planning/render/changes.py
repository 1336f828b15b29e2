"""The difference of two plans as one HTML page that needs nothing else and can be read without scripts."""

from collections.abc import Iterable, Sequence

from lora_fx.planning.render.page import KEYS, Entries, entry, escape, page, preformatted

_LEGEND = f"{KEYS}  Signs: - only in the first plan, + only in the second, × that many sites alike."


def changes_html(a: str, b: str, groups: Iterable[tuple[Sequence[str], list[str]]], sums: str) -> str:
    """Return a page of (path, what was done, what will be done) of sites that stand for all at the paths beside them.

    `a` and `b` say what the two plans are, `sums` how much differs.
    """
    entries = Entries()
    body = "".join(entries.add(_change(row), paths) for row, paths in groups) or "<p>No difference.</p>"
    main = f"<section><h2>What differs, by site</h2>{body}{entries.told()}</section>"
    header = f'<p class="sums">{escape(sums)}</p>'
    return page(f"{a} → {b}", header, main, "", entries.paths, _LEGEND)


def _change(row: Sequence[str]) -> str:
    path, before, after = row
    lines = [(kind, sign, text) for kind, sign, text in (("d", "-", before), ("a", "+", after)) if text]
    body = "".join(f'<span class="{kind}">{sign}    {escape(text)}</span>' for kind, sign, text in lines)
    facts = "" if before and after else "only in the second" if after else "only in the first"
    return entry(path, preformatted(body, f"lines of {path}"), facts or None)
