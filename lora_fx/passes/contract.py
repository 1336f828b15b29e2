"""What every pass is, and the runner that holds it to its word."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from lora_fx.models.twin import make_twin
from lora_fx.passes.editor import Editor, Journal


class Pass(ABC):
    """A change of a torch.fx graph; a subclass names it and writes `run`."""

    name: str
    """What the journal and errors call it."""

    def requires(self, graph_module: fx.GraphModule) -> None:  # noqa: B027  a default
        """Raise the fitting LoraFxError if the pass cannot work on this graph; any graph will do by default."""

    @abstractmethod
    def run(self, editor: Editor) -> None:
        """Change the graph through the editor, and only through it."""

    def ensures(self, graph_module: fx.GraphModule) -> None:  # noqa: B027  a default
        """Raise if the result is not what the pass promises; by default it promises what the editor checks."""


@dataclass(frozen=True, slots=True)
class PassResult:
    """A new GraphModule, and what was done to make it."""

    graph_module: fx.GraphModule
    journal: Journal

    @property
    def modified(self) -> bool:
        return self.journal.modified


def run(graph_module: fx.GraphModule, passes: Sequence[Pass]) -> PassResult:
    """Return a copy of the graph module after all passes, with the journal of every edit; the input stays as it is.

    The copy shares the parameters' storage.  The passes run in their order, each between the checks of what it requires
    and ensures; the copy is linted and recompiled once, at the end.

    Raises:
        LoraFxError: of a pass that cannot work on this graph, or does not hold what it promises, as `apply_pass`.
    """
    copy = make_twin(graph_module, freeze=False)
    assert isinstance(copy, fx.GraphModule)
    return PassResult(copy, rewrite(copy, *passes))


def apply_pass(step: Pass, editor: Editor) -> None:
    """Run one pass on the editor's graph, in place, between the checks of what it requires and ensures.

    Raises:
        Exception: whatever the pass raises, with a note that names it and the passes that ran before on this graph.
    """
    before = ", ".join(editor.passes)
    editor.passes.append(step.name)
    try:
        step.requires(editor.graph_module)
        step.run(editor)
        step.ensures(editor.graph_module)
    except Exception as error:
        error.add_note(f"  in the pass {step.name}{f', after {before}' if before else ''}")
        raise


def rewrite(graph_module: fx.GraphModule, *passes: Pass) -> Journal:
    """Run passes in place, as `apply_pass` does, lint and recompile once, at the end; return what they have changed."""
    editor = Editor(graph_module)
    for step in passes:
        apply_pass(step, editor)
    editor.finish()
    return editor.journal
