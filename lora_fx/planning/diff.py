"""Two plans side by side → PlanDiff: what is decided otherwise.  Pure data; no torch here."""

from dataclasses import asdict, dataclass

from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import PlannedSite
from lora_fx.planning.render.changes import changes_html
from lora_fx.planning.rows import fold_groups, row_of
from lora_fx.text import columns, count, json_text, listing, thousands


@dataclass(frozen=True, slots=True)
class SiteDifference:
    """A site that two plans treat differently; None where a plan has no such site."""

    path: str
    before: tuple[str, str] | None
    """(weight, what is done): `("Linear 64 → 64", "+ r=8 alpha=16")`."""
    after: tuple[str, str] | None


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """How two plans differ; falsy if they do not.  Line numbers, notes and backends do not count."""

    a: str
    b: str
    differences: tuple[SiteDifference, ...]
    same: int
    """Number of sites that both treat alike."""
    trainable: tuple[int, int]

    def __bool__(self) -> bool:
        return bool(self.differences)

    def __str__(self) -> str:
        if not self:
            return f"no difference: {self.a} and {self.b}, {count(self.same, 'site')}"
        lines = [f"--- {self.a}", f"+++ {self.b}"]
        for path, *states in self.folded():
            lines += [f"{sign} {path}  {state}" for sign, state in zip("-+", states, strict=True) if state]
        return "\n".join([*lines, self.stat()])

    def folded(self) -> list[tuple[str, ...]]:
        """Return (path, before, after) with repeated blocks as one; what is not there is an empty text."""
        return [row for row, _ in self.groups()]

    def groups(self) -> list[tuple[tuple[str, ...], list[str]]]:
        """Return the rows of `folded`, each with the paths that it stands for."""
        return fold_groups([(site.path, _joined(site.before), _joined(site.after)) for site in self.differences])

    def stat(self) -> str:
        """Return the sums: how many sites differ, and what becomes of the number of trained parameters."""
        before, after = map(thousands, self.trainable)
        change = before if before == after else f"{before} → {after}"
        return f"{count(len(self.differences), 'site')} differ, {self.same} the same; trainable: {change}"

    def to_json(self) -> str:
        return json_text({"schema_version": 1, **asdict(self)}, indent=1)

    def to_html(self) -> str:
        """Return one page that needs nothing else: each site with what was and what will be done."""
        return changes_html(self.a, self.b, self.groups(), self.stat())


def _joined(state: tuple[str, str] | None) -> str:
    return "" if state is None else columns([state], indent="")


def plan_diff(a: Plan, b: Plan, names: tuple[str, str] | None = None) -> PlanDiff:
    """Return what two plans decide differently, in the order of the first; both stay unchanged."""
    before, after = _states(a), _states(b)
    paths = before | after
    differences = tuple(
        SiteDifference(path, before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path)
    )
    titles = names or (f"{a.model} · {a.source}", f"{b.model} · {b.source}")
    return PlanDiff(*titles, differences, len(paths) - len(differences), (a.trainable, b.trainable))


def _states(plan: Plan) -> dict[str, tuple[str, str]]:
    """Return (weight, what is done) of every site and of every module that is trained whole."""
    states = {planned.path: (planned.site.text(), _doing(planned)) for planned in plan.sites}
    for module in plan.train:
        states[f"train: {module.path}"] = (count(module.parameters, "parameter"), "+ trained whole")
    for rows in plan.tokens:
        ids = listing(map(str, rows.ids))
        states[f"tokens: {rows.weight} of {rows.adapter}"] = (count(len(rows.ids), "row"), f"+ {ids} trained")
    for bias in plan.biases:
        states[f"bias: {bias.path}"] = (count(bias.parameters, "parameter"), "+ trained")
    return states


def _doing(planned: PlannedSite) -> str:
    """Return what is done, with the reason where it is one that somebody wrote down or must know."""
    *_, doing, _backend, reason = row_of(planned)
    if planned.lora is None:
        return doing if planned.decision in ("train", "keep") else f"{doing}: {reason}"
    of = None if planned.slices is None else planned.slices.to_dict()["of"]
    rows = f" of {of}" if isinstance(of, dict) else ""  # unequal parts: equal names can mean other rows
    init = "" if planned.lora.init == "kaiming" else f" init={planned.lora.init}"
    adapter = "" if planned.lora.adapter == "default" else f" adapter={planned.lora.adapter}"
    return f"{doing}{rows}{init}{adapter}"
