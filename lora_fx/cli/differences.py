"""What `lora-fx diff` compares; it is imported when something is compared, not for the help."""

import click

from lora_fx.cli.options import STANDARD, rules_of
from lora_fx.cli.rendering import plan_diff_as
from lora_fx.cli.saved import SavedFileError, read_text
from lora_fx.graphdiff.diff import GraphDiff, compare
from lora_fx.graphdiff.graphs import Graph
from lora_fx.planning.diff import PlanDiff, plan_diff
from lora_fx.planning.plan import Plan
from lora_fx.planning.reading import PlanFileError
from lora_fx.planning.rows import fold_rows
from lora_fx.sources.document import parse_json
from lora_fx.sources.regular import UnreadableError
from lora_fx.text import columns

_JSON = (".json", STANDARD)


def difference(a: str, others: tuple[str, ...], trust: bool, progress: bool | None) -> GraphDiff | PlanDiff:
    """Return how what the operands of `lora-fx diff` name differs."""
    rules = tuple(operand for operand in others if _is_rules(operand))
    if len(others) > 2 or (len(others) == 2 and len(rules) != 2):
        raise click.UsageError("give two models, or a model and one or two rule files")
    if rules:
        read = [rules_of(name) for name in rules]  # a misspelt rule is an error before torch is imported
        from lora_fx.cli.models.spec import compared_by_rules

        return compared_by_rules(a, read, trust, progress)
    (b,) = others
    if a.endswith(_JSON) and b.endswith(_JSON):
        return _of_saved(a, b)
    from lora_fx.cli.models.spec import compared

    return compared(_saved_graph(a), _saved_graph(b), trust, progress)


def _is_rules(operand: str) -> bool:
    """Whether an operand names rules: what is not a MODEL by its form is a rule file, or a shipped one's name."""
    if operand.endswith((".yaml", ".yml")):
        return True
    return not (":" in operand or operand.endswith((*_JSON, ".pt2", ".safetensors")))


def _of_saved(a: str, b: str) -> GraphDiff | PlanDiff:
    first, second = _saved(a), _saved(b)
    if isinstance(first, Plan):
        if isinstance(second, Plan):
            return plan_diff(first, second, (a, b))
        raise SavedFileError(f"{a} is a plan, {b} a graph")
    if isinstance(second, Plan):
        raise SavedFileError(f"{a} is a graph, {b} a plan")
    return compare(first, second)


def _saved(name: str) -> Plan | Graph:
    """Return the plan or the graph that a JSON file holds."""
    text = read_text(name)
    try:
        document = parse_json(text)
    except UnreadableError as error:
        raise SavedFileError(f"{name}: {error}") from error
    if isinstance(document, dict) and document.get("kind") == "lora_fx graph":
        return Graph.from_json(text)
    try:
        return Plan.from_json(text)
    except PlanFileError as error:
        raise SavedFileError(f"{name}: is neither a graph nor a plan of lora_fx: {error}") from error


def _saved_graph(operand: str) -> Graph | str:
    """Return a saved graph, or the operand itself if it is a model."""
    if not operand.endswith(_JSON) or operand.endswith(".index.json"):
        return operand
    graph = _saved(operand)
    if isinstance(graph, Plan):
        raise SavedFileError(f"{operand}: is a plan, which can only be compared with a plan")
    return graph


def shown(diff: GraphDiff | PlanDiff, form: str, stat: bool) -> str:
    """Return a difference in a format, or with `stat` its sums."""
    if isinstance(diff, PlanDiff):
        return plan_diff_as(diff, form, stat)
    forms = {"json": diff.to_json, "html": diff.to_html, "mermaid": diff.to_mermaid, "dot": diff.to_dot}
    text = (lambda: _stat(diff)) if stat and diff else diff.__str__
    return forms.get(form, text)()


def _stat(diff: GraphDiff) -> str:
    """Return a line for each site with how many statements went and came, and the sums."""
    rows = [(site.path, f"-{len(site.removed)} +{len(site.added)}", site.note) for site in diff.changes]
    return "\n".join([columns(fold_rows(rows)), str(diff).splitlines()[-1]])
