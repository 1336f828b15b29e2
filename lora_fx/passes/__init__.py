"""Passes over a torch.fx.GraphModule, and the runner.

A pass has a `name`, says what it `requires`, does its work in `run` through one Editor, and says what it `ensures`.
`run` works on a structural copy: on any exception the input is as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from lora_fx.models.twin import make_twin
from lora_fx.passes.editor import Editor, Journal


class Pass(Protocol):
    """What every pass is."""

    @property
    def name(self) -> str: ...

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise the fitting LoraFxError if the pass cannot work on this graph."""

    def run(self, editor: Editor) -> None:
        """Change the graph through the editor."""

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Raise if the result is not what the pass promises."""


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

    The copy shares the parameters' storage.  It is linted and recompiled once, at the end.

    Raises:
        LoraFxError: of the pass that cannot work on this graph.
    """
    copy = make_twin(graph_module, freeze=False)
    assert isinstance(copy, fx.GraphModule)
    editor = Editor(copy)
    for each in passes:
        apply_pass(each, editor)
    editor.finish()
    for each in passes[-1:]:
        each.ensures(copy)
    return PassResult(copy, editor.journal)


def apply_pass(each: Pass, editor: Editor) -> None:
    """Run one pass on the editor's graph, in place."""
    editor.by = each.name
    each.requires(editor.graph_module)
    each.run(editor)
