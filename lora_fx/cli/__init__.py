"""The command line.  Help, linting, the schema and what works on JSON files import no torch.

A verb is a module of this package with a `command`, and a line in `VERBS`; it is imported when it is called.

Exit status: 0 done or the same, 1 it differs or a rule is violated, 2 trouble.
"""

import sys

try:
    import click
except ImportError:  # pragma: no cover
    print("lora-fx: the command line needs click: pip install click", file=sys.stderr)
    sys.exit(2)

from lora_fx.cli.verbs import Verbs

VERBS = (
    "init", "allocate", "plan", "explain", "diff", "lint", "inspect", "audit", "export", "merge", "bench", "watch",
    "doctor", "schema", "help",
)  # fmt: skip

_EPILOG = """\b
MODEL is one of
  package.module:factory  calls it; executes that code
  file.py:factory         the same
  hf:DIRECTORY            needs config.json only
  hf:ORG/NAME@REVISION    the same, of the hub
  model.pt2               runs what is in it: --trust
  model.safetensors       names and shapes only
  plan.json               a saved plan

A factory returns a model or (model, example_inputs); it is called on the meta device, so no weights are made.  - is the
standard input or output.

Exit status: 0 done or the same, 1 it differs or a rule is violated, 2 trouble."""


@click.group(
    cls=Verbs,
    verbs=VERBS,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="lora-fx", prog_name="lora-fx")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def main(context: click.Context, debug: bool) -> None:
    """LoRA for any PyTorch model: see what will happen, then do it."""
    context.obj = debug
