"""The rule files that come with lora_fx, by name."""

import os
from pathlib import Path

from lora_fx.sources.packaged import packaged


def folder() -> Path:
    """Return where the shipped rule files are."""
    return packaged("shipped_rules", "rules")


def names() -> tuple[str, ...]:
    """Return the names of the shipped rule files, without the suffix."""
    return tuple(sorted(path.stem for path in folder().glob("*.yaml")))


def find(name: str) -> Path:
    """Return the file that a user means by a path or a bare name; a file of their own comes first."""
    given = Path(name)
    bare = given.parent == Path(".") and given.suffix in ("", ".yaml", ".yml")
    if os.path.lexists(given) or not bare or given.stem not in names():
        return given
    return folder() / f"{given.stem}.yaml"
