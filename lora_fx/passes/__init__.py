"""Passes over a torch.fx.GraphModule, and the runner.

A pass has a `name`, says what it `requires`, does its work in `run` through one Editor, and says what it `ensures`.
`run` works on a structural copy: on any exception the input is as it was.
"""

from lora_fx.passes.contract import Pass, PassResult, apply_pass, run
from lora_fx.passes.editor import Editor, Journal

__all__ = ["Editor", "Journal", "Pass", "PassResult", "apply_pass", "run"]
