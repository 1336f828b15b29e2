"""`lora-fx help`: the documentation's word on an error, without a network."""

import re

import click

from lora_fx.sources.packaged import packaged
from lora_fx.text import nearest


@click.command("help", short_help="Explain an error, or a verb.")
@click.argument("name", required=False)
@click.pass_context
def command(context: click.Context, name: str | None) -> None:
    """Print what the documentation says of an error, or a verb's help; without NAME, which there are."""
    assert context.parent is not None
    group = context.parent.command
    assert isinstance(group, click.Group)
    known, verbs = sections(), group.list_commands(context.parent)
    if name is None:
        click.echo("\n".join(["errors:", *(f"  {title}" for title in known), f"verbs: {', '.join(verbs)}"]))
    elif name in verbs and (verb := group.get_command(context.parent, name)) is not None:
        with click.Context(verb, info_name=name, parent=context.parent) as own:
            click.echo(verb.get_help(own))
    else:
        by_key = {title.lower(): title for title in known}
        title = by_key.get(name.rpartition("#")[2].rpartition(".")[2].lower())
        if title is None:
            near = nearest(name, [*known, *verbs])
            hint = f"did you mean {' or '.join(near)}?" if near else "`lora-fx help` lists all"
            raise click.UsageError(f"there is no error and no verb '{name}'; {hint}")
        click.echo(f"{title}\n\n{known[title]}")


def sections() -> dict[str, str]:
    """Return what the page says of each error, as plain text."""
    page = packaged("pages/errors.md", "docs/errors.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)[1:]
    return {title.strip(): plain(text) for title, text in zip(parts[::2], parts[1::2], strict=True)}


def plain(markdown: str) -> str:
    """Return text of the documentation for a terminal: code indented, links as their words."""
    lines, code = [], False
    for line in markdown.strip().splitlines():
        if line.startswith("```"):
            code = not code
        else:
            lines.append(f"    {line}".rstrip() if code else re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", line))
    return "\n".join(lines)
