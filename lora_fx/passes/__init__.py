"""Passes over a torch.fx.GraphModule, and the runner.

A pass has a `name`, says what it `requires`, does its work in `run` through one Editor, and says what it `ensures`.
`run` works on a structural copy: on any exception the input is as it was.
"""

from lora_fx.passes.ask import Ask
from lora_fx.passes.contract import Pass, PassResult, apply_pass, run
from lora_fx.passes.editor import Editor, Journal
from lora_fx.passes.inject import Inject
from lora_fx.passes.merge import Merge
from lora_fx.passes.remove import Remove
from lora_fx.passes.verify import Verify, verify

__all__ = [
    "Ask", "Editor", "Inject", "Journal", "Merge", "Pass", "PassResult", "Remove", "Verify", "apply_pass", "run",
    "verify",
]  # fmt: skip
