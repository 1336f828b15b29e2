"""What the verbs share: arguments, options, and what the shell completes."""

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from lora_fx.rules.ruleset import RuleSet  # help, which needs no rules, imports this file too

F = TypeVar("F", bound=Callable[..., Any])
FORMATS = ("text", "json", "mermaid", "dot", "html")
STANDARD = "-"
_SIZES = re.compile(r"(\d+)[x×](\d+)")


def complete_rules(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return shipped rules that fit, and let the shell add files."""
    from lora_fx.rules import shipped

    names = [CompletionItem(name) for name in shipped.names() if name.startswith(incomplete)]
    return [*names, CompletionItem(incomplete, type="file")]


model_argument = click.argument("model", type=click.Path())
_OUTPUT = "File to write; - is the standard output."
output_option = click.option("-o", "--output", type=click.Path(), default=STANDARD, help=_OUTPUT)
trust_option = click.option("--trust", is_flag=True, help="Read a .pt2 file, which can run any code that is in it.")
data_option = click.option("--data", metavar="FILE", help="Inputs to choose codes by: .safetensors, file.py:factory.")
progress_option = click.option("--no-progress", is_flag=True, help="Do not show how far it is.")


def watched(no_progress: bool) -> bool | None:
    """Return the `progress` of a call: None, which shows it on a terminal, or False."""
    return False if no_progress else None


def rules_argument(required: bool = True, many: bool = False) -> Callable[[F], F]:
    """Add RULES: files, or names of shipped ones."""
    return click.argument("rules", required=required, nargs=-1 if many else 1, shell_complete=complete_rules)


def format_option(*forms: str) -> Callable[[F], F]:
    """Add --format."""
    return click.option("--format", "form", type=click.Choice(forms), default="text", show_default=True)


def sizes_of(tokens: str | None, example: str) -> tuple[int, int] | None:
    """Return (batch, length) of --tokens; None where it is not given."""
    if tokens is None:
        return None
    sizes = _SIZES.fullmatch(tokens)
    if sizes is None or 0 in map(int, sizes.groups()):
        raise click.UsageError(f"--tokens {tokens}: write batch and length as {example}")
    return int(sizes[1]), int(sizes[2])


def rules_of(name: str) -> "RuleSet":
    """Return the rules of a file, of a shipped one by its name, or of the standard input.

    Raises:
        RuleError: with every problem.
    """
    from lora_fx.rules.reader import read_rules, read_stream

    return read_stream(sys.stdin.buffer, "standard input") if name == STANDARD else read_rules(name)
