"""The group of verbs: each is imported when it is called, and all end alike."""

import contextlib
import importlib
import importlib.util
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import IO, Any

import click

from lora_fx.errors import LoraFxError, NoMatchError, RuleError
from lora_fx.text import nearest, visible

DIFFERS, TROUBLE = 1, 2
VIOLATIONS = (RuleError, NoMatchError)


class Misuse(click.UsageError):
    """A usage error in one line, with where help is."""

    def show(self, file: IO[Any] | None = None) -> None:
        path = self.ctx.command_path if self.ctx is not None else "lora-fx"
        click.echo(f"lora-fx: {visible(self.format_message())} (see {path} --help)", err=True)


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except (Misuse, click.exceptions.NoArgsIsHelpError):
        raise
    except click.UsageError as error:
        raise Misuse(error.format_message(), error.ctx) from error


class Verbs(click.Group):
    """A group whose commands are modules of this package."""

    def __init__(self, *args: Any, verbs: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.verbs = tuple(name for name in verbs if importlib.util.find_spec(f"lora_fx.cli.{name}"))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.verbs:
            return None
        command = importlib.import_module(f"lora_fx.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _in_one_line():
            return super().make_context(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take `--debug` wherever it stands."""
        if "--debug" in args:
            args = ["--debug", *(word for word in args if word != "--debug")]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.verbs and not args[0].startswith("-"):
            near = nearest(args[0], self.verbs, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self.verbs)}"
            ctx.fail(f"there is no verb '{args[0]}'; {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; an error is shown and becomes the exit status."""
        try:
            with _in_one_line(), warnings.catch_warnings():
                if not ctx.params.get("debug"):
                    for kind in (FutureWarning, DeprecationWarning):  # meant for torch's own authors
                        warnings.simplefilter("ignore", kind)
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.obj:  # --debug
                traceback.print_exc()
            click.echo(f"lora-fx: {text_of(error)}", err=True)
            sys.exit(DIFFERS if isinstance(error, VIOLATIONS) else TROUBLE)


def text_of(error: Exception) -> str:
    """Return the text of an error of ours, with where it is explained; the first line of any other."""
    if isinstance(error, LoraFxError):
        return "\n".join([str(error), *error.__notes__])
    return visible(f"{type(error).__name__}: {error}".split("\n")[0])
