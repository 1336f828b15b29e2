"""The command line.  Needs the extra `cli`; linting, help and the schema import no torch.

Exit status: 0 done, 1 a rule is violated, 2 trouble.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import NoReturn

try:
    import click
except ImportError:  # pragma: no cover
    sys.exit("lora-fx: the command line needs click: pip install 'lora-fx[cli]'")

from lora_fx.errors import LoraFxError, NoMatchError, RuleError
from lora_fx.text import count

VIOLATED, TROUBLE = 1, 2
_MODEL_HELP = (
    "MODEL is package.module:factory, file.py:factory (both execute that code, on the meta device; the factory returns "
    "a model or (model, example_inputs)) or hf:DIRECTORY (needs config.json only)."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lora-fx", prog_name="lora-fx")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def main(context: click.Context, debug: bool) -> None:
    """LoRA for any PyTorch model: see what will happen, then do it."""
    context.obj = debug


@main.command()
@click.argument("rules", nargs=-1, required=True)
@click.pass_context
def lint(context: click.Context, rules: tuple[str, ...]) -> None:
    """Check rule files; needs neither a model nor torch."""
    from lora_fx.linting import lint as lint_file

    failed = False
    for name in rules:
        try:
            found, warnings = lint_file(name)
        except RuleError as error:
            failed = True
            click.echo(str(error), err=True)
            continue
        for warning in warnings:
            click.echo(f"warning: {warning}", err=True)
        click.echo(f"{name}: {count(len(found.rules), 'rule')}, no problem")
    context.exit(VIOLATED if failed else 0)


@main.command(epilog=_MODEL_HELP)
@click.argument("model")
@click.argument("rules")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--all", "everything", is_flag=True, help="Show repeated blocks one by one.")
@click.option("-o", "--output", default="-", help="File to write; - is the standard output.")
@click.pass_context
def plan(context: click.Context, model: str, rules: str, form: str, everything: bool, output: str) -> None:
    """Show what the rules would do to every linear of MODEL, and why; nothing is changed."""
    try:
        text = _plan(model, rules, form, everything)
        _write(text, output)
    except (RuleError, NoMatchError) as error:
        _fail(error, VIOLATED, context.obj)
    except Exception as error:
        _fail(error, TROUBLE, context.obj)


def _plan(model: str, rules: str, form: str, everything: bool) -> str:
    from lora_fx.rules import read_rules

    read = read_rules(rules)  # a misspelt rule is told before torch is imported
    from lora_fx.api import plan as make_plan
    from lora_fx.modelspec import load_model
    from lora_fx.plantext import plan_text

    built, inputs = load_model(model)
    found = make_plan(built, read, inputs)
    return found.to_json() if form == "json" else plan_text(found, fold=not everything)


@main.command()
@click.argument("base", type=click.Path())
@click.argument("adapters", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="Directory to write; continued if unfinished.")
@click.option("--out-dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Default: each tensor's own.")
@click.option("--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the stochastic rounding.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--all", "everything", is_flag=True, help="Show every tensor, not only those that rounding hurt most.")
@click.option("--no-progress", is_flag=True, help="Show no progress bar.")
@click.pass_context
def merge(
    context: click.Context,
    base: str,
    adapters: tuple[str, ...],
    output: str,
    out_dtype: str | None,
    rounding: str,
    seed: int,
    form: str,
    everything: bool,
    no_progress: bool,
) -> None:
    """Fold ADAPTERS into the checkpoint BASE, in bounded memory; nothing is changed but the directory given by -o."""
    try:
        from lora_fx.checkpoint.streaming import Options, merge_files

        with click.progressbar(length=1, label="merging", hidden=no_progress, file=sys.stderr) as bar:

            def show(done: int, total: int, name: str) -> None:
                bar.length = total
                bar.update(done - bar.pos)

            report = merge_files(base, adapters, output, Options(out_dtype, rounding, seed), show)
        click.echo(report.to_json() if form == "json" else report.text(everything))
    except Exception as error:
        _fail(error, TROUBLE, context.obj)


@main.command(epilog=_MODEL_HELP)
@click.argument("model")
@click.argument("path")
@click.argument("rules")
@click.pass_context
def explain(context: click.Context, model: str, path: str, rules: str) -> None:
    """Say why the site at PATH (a name or a glob) of MODEL is adapted by RULES or not."""
    try:
        click.echo(_explain(model, path, rules))
    except (RuleError, NoMatchError) as error:
        _fail(error, VIOLATED, context.obj)
    except Exception as error:
        _fail(error, TROUBLE, context.obj)


def _explain(model: str, path: str, rules: str) -> str:
    from lora_fx.rules import read_rules

    read = read_rules(rules)  # a misspelt rule is told before torch is imported
    from lora_fx.api import explain as explain_sites
    from lora_fx.modelspec import load_model

    built, inputs = load_model(model)
    return explain_sites(built, path, read, inputs)


@main.command()
def schema() -> None:
    """Print the JSON schema of rule files, for editors."""
    from lora_fx.schema import schema_text

    click.echo(schema_text(), nl=False)


def _write(text: str, output: str) -> None:
    if output == "-":
        click.echo(text)
    else:
        Path(output).write_text(text + "\n", encoding="utf-8")


def _fail(error: Exception, status: int, debug: bool) -> NoReturn:
    """End with the error's text (its first line, for errors that are not ours) and the exit status."""
    if debug:
        traceback.print_exc()
    text = str(error) if isinstance(error, LoraFxError) else f"{type(error).__name__}: {error}".splitlines()[0]
    click.echo(f"lora-fx: {text}", err=True)
    sys.exit(status)
