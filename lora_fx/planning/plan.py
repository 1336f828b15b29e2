"""What `apply` will do to a model, and why: printable, countable, serialisable.  Pure data; no torch here."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_fx.planning.decisions import Decisions
from lora_fx.planning.planned import PlannedRegion, PlannedSite, TrainedRows
from lora_fx.planning.reading import SCHEMA_VERSION, read_plan
from lora_fx.planning.render.html import decisions_html
from lora_fx.planning.render.notebook import InNotebook
from lora_fx.planning.rows import region_lines, rows_of, table, training_lines
from lora_fx.text import columns, count, json_text, share_of_parameters, wrapped

_DOES = {"adapt": "adapted", "train": "trained", "keep": "kept", "skip": "skipped", "refuse": "refused"}


@dataclass(frozen=True, slots=True, repr=False)
class Plan(InNotebook, Decisions):
    """What `apply` will do to every site of a model, and why: printable, countable, serialisable."""

    regions: tuple[PlannedRegion, ...] = ()
    capture: object = field(default=None, compare=False, repr=False)
    """The graphs that were captured while planning; not part of the plan's JSON."""
    first_values: object = field(default=None, compare=False, repr=False)
    """A and B by site, as data made them (`lora_fx.plan_from_data`); not part of the plan's JSON."""

    @staticmethod
    def of(decisions: Decisions, **computed: Any) -> "Plan":
        """Return the plan of what is decided, with `sites`, `notes`, `regions` and `capture` as far as they are given.

        Regions and captures of decisions that are a plan already are left behind.
        """
        return Plan(**(decisions.decided() | computed))

    @property
    def header(self) -> str:
        """`GPT · qkvo · 48 of 48 adapted sites in graphs`."""
        in_graph = sum(site.backend == "graph" for site in self.adapted)
        how = f"{in_graph} of {len(self.adapted)} adapted sites in graphs" if self.adapted else "nothing adapted"
        return f"{self.model} · {self.source} · {how}"

    @property
    def sums(self) -> str:
        """How many sites are adapted, trained whole, kept and refused, and how much is trained."""
        sites = Counter(site.decision for site in self.sites)
        whole = f"{sites['train']} to train whole, " if sites["train"] else ""
        return (
            f"{sites['adapt']} to adapt, {whole}{sites['keep'] + sites['skip']} to keep, {sites['refuse']} refused.  "
            f"Trainable: {share_of_parameters(self.trainable, self.total)}."
        )

    def _heading(self) -> str:
        return self.header

    def __str__(self) -> str:
        return self.text()

    def text(self, fold: bool = True, width: int | None = None) -> str:
        """Return the header, a line for each site (identical sites of repeated blocks as one), the notes and the sums.

        Where the table is wider than `width`, each site takes two lines; other long lines are broken.
        """
        lines = [*self._modules(), *region_lines(self.regions), *training_lines(self.sites, self.regions)]
        notes = [f"  note: {note}" for note in self.notes]
        parts = [self.header, "", table(rows_of(self.sites, fold), width), *lines, *notes, "", self.sums]
        return wrapped("\n".join(parts), width)

    def stat(self) -> str:
        """Return the header, a line for each rule and one for what no rule takes, and the sums."""
        groups: dict[tuple[str, str], list[PlannedSite]] = {}
        for site in self.sites:
            groups.setdefault((site.decision, site.rule or site.reason), []).append(site)
        rows = []
        for (decision, rule), sites in groups.items():
            does = _DOES[decision]
            trainable = sum(site.trainable for site in sites)
            rows.append((rule, count(len(sites), "site"), does, count(trainable, "parameter") if trainable else ""))
        return "\n".join([self.header, "", columns(rows), *self._modules(), "", self.sums])

    def to_html(self, fold: bool = True) -> str:
        """Return one page that needs nothing else: sums, parameters by site, sites by what is done and why.

        It can be searched and folded; repeated sites are one line if `fold`.
        """
        return decisions_html(self, self.regions, fold)

    def _modules(self) -> list[str]:
        lines = [f"  train whole: {module.path}, {count(module.parameters, 'parameter')}" for module in self.train]
        lines += [f"  train {_told(rows)}" for rows in self.tokens]
        if self.biases:
            number = count(sum(bias.parameters for bias in self.biases), "parameter")
            lines.append(f"  train biases of other layers: {count(len(self.biases), 'vector')}, {number}")
        return lines

    def to_json(self) -> str:
        """Return the plan as JSON, the same text for the same plan; `Plan.from_json` reads it."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "total": self.total,
            "trainable": self.trainable,
            "sites": [_row(site) for site in self.sites],
            "train": [asdict(module) for module in self.train],
            **({"tokens": [asdict(rows) for rows in self.tokens]} if self.tokens else {}),
            **({"biases": [asdict(bias) for bias in self.biases]} if self.biases else {}),
            "regions": [asdict(region) for region in self.regions],
            "notes": self.notes,
            "unmatched_rules": self.unmatched_rules,
            "rules": self.rules,
        }
        return json_text(document, indent=1)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Return the plan that `to_json` wrote.

        Raises:
            PlanFileError: the text is not one, of another schema version, or says what no plan can say; a ValueError.
        """
        return read_plan(Plan, text)


def _told(rows: TrainedRows) -> str:
    """Return what a plan says of rows that are trained alone."""
    of = f"{count(len(rows.ids), 'row')} of {rows.weight}"
    if rows.tied_to:
        return f"{of}: those of {rows.tied_to}, to which it is tied"
    return f"{of}, {count(rows.parameters, 'parameter')}"


# -- JSON


def _row(planned: PlannedSite) -> dict[str, object]:
    """Return a site and what is decided of it as one flat row."""
    row = asdict(planned) | {"lora": None if planned.lora is None else planned.lora.to_dict()}
    return {**row.pop("site"), **row}
