"""What docs/performance.md tells, all of it from its one table of measurements: sentences, small tables, pictures.

`benchmarks/training.py --write` puts the table there; `python -m tests.support.performance` renews the rest.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PAGE, LANDING = DOCS / "performance.md", DOCS / "index.md"
SHOWN = "all r8"
"""Which adapters the sentences and pictures are about."""
ADAPTED = ("c_attn r8", "q,v r8 (slices)", "q,v r8", "all r8", "all r16")
"""The order of lines of one model."""
OURS, PEFT = "#1d7a50", "#a3541d"
Interval = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: ratios are to LB, intervals are (median, low, high)."""

    processor: str
    model: str
    adapted: str
    dropout: float
    dtype: str
    ours: Interval | None
    peft: Interval | None
    removed: str
    saved: float
    saved_over_peft: float | None

    @property
    def setting(self) -> str:
        dropout = f"dropout {self.dropout:g}" if self.dropout else "no dropout"
        return f"{self.processor}, {self.dtype}, {dropout}".removeprefix(", ")


def rows_of(page: str) -> list[Row]:
    """Return the lines of the table of measurements, between its marks."""
    return [_row(list(cells)) for cells in rows_between(page, "table")]


def _row(cells: list[str]) -> Row:
    processor, model, adapted, dropout, dtype, ours, peft, removed, saved, over = cells[:10]
    return Row(
        processor, model, adapted, float(dropout), dtype, _interval(ours), _interval(peft), removed, float(saved),
        float(over) if over else None,
    )  # fmt: skip


def _interval(cell: str) -> Interval | None:
    numbers = [float(number) for number in re.findall(r"[\d.]+", cell)]
    return (numbers[0], numbers[1], numbers[2]) if numbers else None


def short_name(processor: str) -> str:
    """Return a processor's name as the table has it: `Intel Xeon`, `AMD EPYC`."""
    return re.sub(r"\((R|TM)\)|\bProcessor\b.*|\bCPU\b.*|@.*|\b\d+\S*", "", processor).strip()


def with_measurements(page: str, table: str) -> str:
    """Return the page with the lines of a table in place of those of the same run; others stay, void ones are left out.

    A run is a processor with a model, its adapters, dropout and dtype.
    """
    head, dashes, *new = table.splitlines()
    old = [line.strip() for line in _between(page, "table").splitlines() if line.strip().startswith("|")][2:]
    runs = {_run(line): line for line in (*old, *(line for line in new if "| void |" not in line))}
    ranks = [list(dict.fromkeys(run[place] for run in runs)) for place in range(5)]
    ranks[2] = [*ADAPTED, *(name for name in ranks[2] if name not in ADAPTED)]
    ordered = sorted(runs, key=lambda run: [rank.index(cell) for rank, cell in zip(ranks, run, strict=True)])
    return written(page, "table", "\n".join([head, dashes, *(runs[run] for run in ordered)]))


def _run(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip("|").split("|")[:5])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a table in Markdown, of which the first is the head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def told(page: Path | None, name: str, rows: Sequence[Sequence[str]], keys: int = 0) -> None:
    """Write rows as a table to the standard output, and between the marks of a page where one is given.

    With `keys`, the first cells of a row are its name, and rows of the page that have another name stay.  Where one of
    both tables has columns more (times), the others have no cell there.
    """
    if page is not None:
        text = page.read_text(encoding="utf-8")
        whole = _beside(_between(text, name), rows, keys) if keys else rows
        page.write_text(written(text, name, markdown(whole)), encoding="utf-8")
    print(markdown(rows))


def _beside(old: str, rows: Sequence[Sequence[str]], keys: int) -> list[Sequence[str]]:
    """Return the rows in place of those of an old table that have their names, and the new ones behind them."""
    lines = [line.strip() for line in old.splitlines() if line.strip().startswith("|")]
    table = [tuple(cell.strip() for cell in line[1:-1].split("|")) for line in lines]
    known = [dict(zip(table[0], row, strict=True)) for row in table[2:]]
    added = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    heads = table[0] if known and set(table[0]) > set(rows[0]) else rows[0]
    named = {tuple(row.get(head, "") for head in heads[:keys]): row for row in (*known, *added)}
    return [heads, *([row.get(head, "") for head in heads] for row in named.values())]


# -- marks


def rows_between(page: str, name: str) -> list[tuple[str, ...]]:
    """Return the lines of the table between the marks of a page, without its head."""
    lines = [line.strip() for line in _between(page, name).splitlines() if line.strip().startswith("|")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]


def _marks(name: str) -> re.Pattern[str]:
    return re.compile(rf"^( *)<!-- {name}:begin -->\n(.*?)^ *<!-- {name}:end -->", re.DOTALL | re.MULTILINE)


def _between(page: str, name: str) -> str:
    match = _marks(name).search(page)
    if match is None:
        raise SystemExit(f"the page has no <!-- {name}:begin --> … <!-- {name}:end -->")
    return match[2]


def written(page: str, name: str, text: str) -> str:
    """Return the page with the text between two marks, as far in as they are."""
    _between(page, name)

    def filled(match: re.Match[str]) -> str:
        body = "".join(f"{match[1]}{line}".rstrip() + "\n" for line in text.splitlines())
        return f"{match[1]}<!-- {name}:begin -->\n\n{body}\n{match[1]}<!-- {name}:end -->"

    return _marks(name).sub(filled, page)


def renewed(page: str) -> str:
    """Return the page with everything that follows from its table."""
    rows = rows_of(page)
    return written(written(page, "summary", "\n".join(sentences(rows))), "tables", "\n".join(tables(rows)))


def landing(page: str, rows: Sequence[Row]) -> str:
    """Return the landing page with its three figures."""
    return written(page, "figures", "\n".join(figures(rows)))


# -- what is told


def _range(values: Iterable[float]) -> str:
    known = sorted(values)
    return f"{known[0]:.2f} to {known[-1]:.2f}"


def sentences(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what the table says of adapters on all linear layers: times by processor, and bytes."""
    shown = [row for row in rows if row.adapted == SHOWN]
    for what, dtype, dropout in (
        ("With rank 8 on all linear layers a step takes", "float32", 0),
        ("With dropout 0.1 it takes", "float32", 0.1),
        ("On a bfloat16 base it takes", "bfloat16", 0),
    ):
        timed = [row for row in shown if (row.dtype, row.dropout) == (dtype, dropout) and row.ours and row.peft]
        told = [
            f"**{_range(row.ours[0] for row in group)}** on {processor}, where PEFT takes "
            f"{_range(row.peft[0] for row in group)}"
            for processor in dict.fromkeys(row.processor for row in timed)
            if (group := [row for row in timed if row.processor == processor])
        ]
        yield f"* {what} {', and '.join(told)}{'' if dropout or dtype != 'float32' else ' (frozen base: 1)'}."
    kept, kept_dropped = (
        _range(row.saved_over_peft or 1 for row in shown if row.dtype == "float32" and row.dropout == dropout)
        for dropout in (0, 0.1)
    )
    yield f"* Between the passes **{kept}** of the bytes are kept that PEFT keeps, with dropout {kept_dropped}."


def figures(rows: Sequence[Row]) -> Iterator[str]:
    """Yield three figures as cards."""
    chosen = [row for row in rows if row.adapted == SHOWN and row.dtype == "float32"]
    removed = [float(row.removed.rstrip(" %")) for row in chosen if row.removed and not row.dropout]
    kept = [row.saved_over_peft for row in chosen if row.dropout and row.saved_over_peft]
    for figure, text in (
        (f"{statistics.median(removed):.0f} %", "of the time that PEFT adds to a training step is not spent"),
        (f"{statistics.median(kept):.2f} ×", "the memory that PEFT keeps between the passes, with dropout"),
        ("0 bits", "between a model and its adapted twin, before training"),
    ):
        yield f"<div markdown>\n**{figure}**\n{text}\n</div>"


def _order(row: Row) -> tuple[str, bool, float]:
    return row.processor, row.dtype != "float32", row.dropout


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield one small table for each dtype and dropout."""
    for setting in dict.fromkeys(row.setting for row in sorted(rows, key=_order)):
        yield f"**{setting}**\n"
        yield "| adapted | lora_fx | PEFT | excess removed | kept |\n|---|---|---|---|---|"
        for row in rows:
            if row.setting == setting:
                times = (f"{time[0]:.3f}" if time else "" for time in (row.ours, row.peft))
                kept = f"{row.saved_over_peft:.2f}" if row.saved_over_peft else ""
                yield f"| {row.model}, {row.adapted} | {' | '.join(times)} | {row.removed} | {kept} |"
        yield ""


# -- pictures


def charts(rows: Sequence[Row]) -> dict[str, str]:
    """Return the pictures by file name: time over LB, and bytes kept over LB."""
    chosen = [row for row in rows if row.adapted == SHOWN]
    return {
        "performance-time.svg": _chart("Time of a training step, over the frozen base's", chosen, _time_marks),
        "performance-kept.svg": _chart(
            "Bytes kept between the passes, over the frozen base's", _unique(chosen), _kept_marks
        ),
    }


def _unique(rows: Iterable[Row]) -> list[Row]:
    """Return a row for each model and setting whatever the processor: bytes are the same on all."""
    return list({(row.model, row.dtype, row.dropout): replace(row, processor="") for row in rows}.values())


def _time_marks(row: Row) -> list[tuple[str, Interval]]:
    return [(name, time) for name, time in (("lora_fx", row.ours), ("PEFT", row.peft)) if time]


def _kept_marks(row: Row) -> list[tuple[str, Interval]]:
    theirs = row.saved / row.saved_over_peft if row.saved_over_peft else row.saved
    return [("lora_fx", (row.saved,) * 3), ("PEFT", (theirs,) * 3)]


DARK = """<style>@media (prefers-color-scheme: dark) {
[fill="#f6f8fa"] { fill: #161b22 } [fill="#1f2328"] { fill: #e6edf3 } [stroke="#d0d7de"] { stroke: #3d444d }
[stroke="#57606a"] { stroke: #9198a1 } [fill="#1d7a50"] { fill: #5fc797 } [stroke="#1d7a50"] { stroke: #5fc797 }
[fill="#a3541d"] { fill: #f0a36a } [stroke="#a3541d"] { stroke: #f0a36a } [fill="#b00020"] { fill: #ff8182 }
[fill="#1b6e1b"] { fill: #6fdd8b } [fill="#8a6100"] { fill: #eac54f } [fill="#00606f"] { fill: #76e3ea }
}</style>"""
"""What the colours of the pictures are on a dark page."""
_LEFT, _WIDE, _ROW, _TOP = 104, 330, 19, 76


def _chart(title: str, rows: Sequence[Row], marks_of: Callable[[Row], list[tuple[str, Interval]]]) -> str:
    ends = [end for row in rows for _, mark in marks_of(row) for end in mark]
    low, high = min(1.0, *ends), max(1.0, *ends)
    low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)

    def x(ratio: float) -> float:
        return _LEFT + _WIDE * (ratio - low) / (high - low)

    step = next(step for step in (0.1, 0.2, 0.5, 1) if (high - low) / step <= 8)
    ticks = [round(step * k, 1) for k in range(100) if low <= step * k <= high]
    drawn = [f'<text x="{x(tick):.1f}" y="{_TOP - 16}" text-anchor="middle">{tick:g}</text>' for tick in ticks]
    y = _TOP
    for setting, group in groupby(sorted(rows, key=_order), lambda row: row.setting):
        drawn.append(f'<text x="8" y="{y + 4}" font-weight="bold">{setting}</text>')
        members = list(group)
        drawn += [
            f'<path d="M{x(tick):.1f} {y + 8}v{_ROW * len(members) + 2}" stroke="{"#57606a" if tick == 1 else "#d0d7de"}"/>'
            for tick in ticks
        ]
        y += _ROW
        for row in members:
            drawn.append(f'<text x="14" y="{y + 4}">{row.model}</text>')
            for name, (middle, least, most) in marks_of(row):
                colour = OURS if name == "lora_fx" else PEFT
                drawn.append(f'<path d="M{x(least):.1f} {y}H{x(most):.1f}" stroke="{colour}" stroke-width="2"/>')
                drawn.append(
                    f'<circle cx="{x(middle):.1f}" cy="{y}" r="4" fill="{colour}">'
                    f"<title>{name} {middle:.3f}</title></circle>"
                )
            y += _ROW
        y += 5
    legend = "".join(
        f'<circle cx="{at}" cy="36" r="4" fill="{colour}"/><text x="{at + 8}" y="40">{name}</text>'
        for at, name, colour in ((14, "lora_fx", OURS), (74, "PEFT", PEFT))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="450" height="{y}" viewBox="0 0 450 {y}" role="img" '
        f'aria-label="{title}" font-family="system-ui, sans-serif" font-size="12" fill="#1f2328">\n'
        f'{DARK}\n<rect width="100%" height="100%" rx="8" fill="#f6f8fa"/>\n'
        f'<text x="8" y="19" font-weight="bold" font-size="13">{title}</text>\n{legend}\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


def pages() -> dict[Path, str]:
    """Return what every file that follows from the table must be."""
    page = renewed(PAGE.read_text(encoding="utf-8"))
    rows = rows_of(page)
    drawn = {DOCS / "images" / name: text for name, text in charts(rows).items()}
    return {PAGE: page, LANDING: landing(LANDING.read_text(encoding="utf-8"), rows), **drawn}


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
