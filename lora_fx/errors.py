"""Every exception of lora_fx.

Each carries fields, not only a text, and reads alike: the first line says what is wrong and where; the facts stand
aligned under it, all of them; the last line says what to do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_fx.text import caret, columns, count, shortened, visible

MOST_SHOWN = 200
"""Of the problems that one error lists."""
LONGEST_NAME = 200
"""Of a file's name, as it is shown."""
LONGEST_FACT = 400
"""Of what one column of an error says."""


class LoraFxError(Exception):
    """Base of all errors that lora_fx raises on purpose.

    A traceback ends with where the documentation explains the error; `str(error)` is the message alone.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*_visible(args))
        self.add_note(f"  see: lora-fx help {type(self).__name__}")

    def __reduce__(self) -> tuple[object, ...]:
        # The default calls the class with the finished text; a worker process could not send the error home.
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[LoraFxError], args: tuple[object, ...], fields: dict[str, object]) -> LoraFxError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


def _visible(args: Sequence[object]) -> Iterator[object]:
    """Yield what an exception is made of, with texts as they may be shown."""
    return (visible(arg, kept="\n\t") if isinstance(arg, str) else arg for arg in args)


def _message(headline: str, facts: Sequence[Sequence[str]] = (), advice: str = "") -> str:
    shown = [[shortened(cell, LONGEST_FACT) for cell in fact] for fact in facts[:MOST_SHOWN]]
    more = f"  … and {len(facts) - MOST_SHOWN:,} more" if len(facts) > MOST_SHOWN else ""
    return "\n".join(filter(None, (headline, columns(shown), more, f"  {advice}" if advice else "")))


class LoraFxWarning(UserWarning):
    """Something that works but is probably not meant."""

    def __init__(self, *args: object) -> None:
        super().__init__(*_visible(args))


@dataclass(frozen=True, slots=True)
class SourceSpan:
    """Where something is written: line and column, from 1, in a file; line 0 with a path in rules given as a dict."""

    file: str = ""
    line: int = 0
    column: int = 0
    length: int = 1
    text: str = ""
    """The whole line."""
    path: str = ""
    """Such as `rules[1].lora.r`."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a rule file: what, where, what to do."""

    message: str
    span: SourceSpan = SourceSpan()
    hint: str = ""

    @property
    def line(self) -> int:
        return self.span.line

    @property
    def column(self) -> int:
        return self.span.column

    def text(self, source: str) -> str:
        """Return the problem with its line, a caret under what is meant, and the hint, for a source of this name."""
        at = f"{source}:{self.line}:{self.column}" if self.line else ": ".join(filter(None, (source, self.span.path)))
        shown = self.line and self.span.text
        line = f"\n{caret(self.span.text, self.line, self.column, self.span.length)}" if shown else ""
        return _message(f"{at}: {self.message}{line}", advice=self.hint)


class RuleError(LoraFxError):
    """The rules cannot be read.  `problems` holds every problem found, in the order of the file.

    Of very many the first are kept; `more` says how many there are beside.
    """

    def __init__(self, source: str, problems: Sequence[Problem], more: int = 0) -> None:
        self.source = source
        self.problems = tuple(problems)
        self.more = more
        total, shown = len(self.problems) + more, shortened(source, LONGEST_NAME)
        head = "" if total == 1 else f"{total:,} problems in {shown}\n"
        tail = f"\n… and {count(more, 'more problem')}" if more else ""
        super().__init__(head + "\n".join(problem.text(shown) for problem in self.problems) + tail)


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A rule (or a pattern of `train:`) whose expectation does not hold: what it looked for, what is there."""

    rule: str
    pattern: str
    expected: str
    found: int
    nearest: tuple[str, ...] = ()
    """What looks like the pattern."""
    almost: str = ""
    """A site that has the name, and which other condition it does not meet."""
    what: str = "sites"
    span: SourceSpan = SourceSpan()

    def text(self, total: int) -> str:
        """Return what failed, where, and what to do; of so many sites."""
        of_rule = self.what == "sites"
        who, among = (f"rule '{self.rule}'", f"{total}") if of_rule else (self.rule, "the")
        headline = f"{who} matched {self.found or 'none'} of {among} {self.what}"
        placed = Problem(headline, self.span).text(self.span.file) if self.span.line else headline
        expected = self.expected if self.found else ""
        facts = [("nearest", ", ".join(self.nearest)), ("almost", self.almost), ("expected", expected)]
        return _message(placed, [("pattern", self.pattern), *(fact for fact in facts if fact[1])], self._advice())

    def _advice(self) -> str:
        if self.what != "sites":
            return "fix the pattern, or take it away"
        if self.found:
            return "fix the pattern, or change `expect`"
        return "fix the pattern, or set `expect: any` if a model need not have it"


class NoMatchError(LoraFxError):
    """A rule matched nothing, or not the number of sites it expects.  `unmatched` holds every such rule.

    Of very many the first are kept; `more` says how many there are beside.
    """

    def __init__(self, unmatched: Sequence[Unmatched], sites: int, more: int = 0) -> None:
        self.unmatched = tuple(unmatched)
        self.sites = sites
        self.more = more
        tail = [f"… and {count(more, 'more rule')}"] if more else []
        super().__init__("\n".join([*(rule.text(sites) for rule in self.unmatched), *tail]))

    @property
    def nearest(self) -> tuple[str, ...]:
        """What looks like the first unmatched pattern."""
        return self.unmatched[0].nearest


class StalePlanError(LoraFxError):
    """The plan was made for another model, or the model has changed since.

    `differences` holds (path, planned, found) for every site that differs.
    """

    def __init__(self, differences: Sequence[tuple[str, str, str]]) -> None:
        self.differences = tuple(differences)
        facts = [(path, f"planned {planned}", f"found {actual}") for path, planned, actual in self.differences]
        advice = "plan again: lora_fx.plan(model, rules)"
        super().__init__(_message("the plan was made for a different model", facts, advice))


class CaptureError(LoraFxError):
    """A part of the model cannot be captured into a graph.  `failures` holds (path, reason) for each."""

    def __init__(self, headline: str, failures: Sequence[tuple[str, str]] = (), advice: str = "") -> None:
        self.failures = tuple(failures)
        super().__init__(_message(headline, self.failures, advice))


class RefusedError(LoraFxError):
    """What was asked for would be wrong or without effect.  `refusals` holds (path, reason) for each."""

    def __init__(self, headline: str, refusals: Sequence[tuple[str, str]] = (), advice: str = "") -> None:
        self.refusals = tuple(refusals)
        super().__init__(_message(headline, self.refusals, advice))


class AdapterFileError(LoraFxError):
    """An adapter's files are missing, damaged, or not an adapter.  `path` is the file."""

    def __init__(self, path: str, headline: str, facts: Sequence[Sequence[str]] = (), advice: str = "") -> None:
        self.path = path
        self.facts = tuple(tuple(fact) for fact in facts)
        super().__init__(_message(f"{path}: {headline}", self.facts, advice))


class AdapterMismatchError(LoraFxError):
    """An adapter does not belong to this model.  `mismatches` holds (key, in the file, in the model) for each."""

    def __init__(self, headline: str, mismatches: Sequence[tuple[str, str, str]] = (), advice: str = "") -> None:
        self.mismatches = tuple(mismatches)
        facts = [(key, f"file {in_file}", f"model {in_model}") for key, in_file, in_model in self.mismatches]
        super().__init__(_message(headline, facts, advice))


class ExportError(LoraFxError):
    """An adapter cannot be expressed in the target's format.  `target` names it, `facts` say why."""

    def __init__(self, target: str, headline: str, facts: Sequence[Sequence[str]] = (), advice: str = "") -> None:
        self.target = target
        self.facts = tuple(tuple(fact) for fact in facts)
        super().__init__(_message(f"{target}: {headline}", self.facts, advice))


class MergeError(LoraFxError):
    """A merge would give wrong weights.  `problems` holds (path, reason) for each; nothing was merged."""

    def __init__(self, headline: str, problems: Sequence[tuple[str, str]] = (), advice: str = "") -> None:
        self.problems = tuple(problems)
        super().__init__(_message(headline, self.problems, advice))


class InvariantError(LoraFxError):
    """`verify` found an adapted model that is not as it must be: a defect.  `problems` holds (path, reason)."""

    def __init__(self, headline: str, problems: Sequence[tuple[str, str]] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__(_message(headline, self.problems, "please report this with the model's plan"))
