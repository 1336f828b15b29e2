"""Files of others are regular and of bounded size before they are opened.

A path that is a pipe, a device or a directory is refused before it is opened, so that nothing waits or never ends; what
is longer than it may be is refused before it is read.
"""

import os
import re
import stat
from typing import IO

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_NO_WAITING = getattr(os, "O_NONBLOCK", 0)
SURROGATE = re.compile(r"[\ud800-\udfff]")


class UnreadableError(ValueError):
    """Something cannot be read; the text says why in words that follow the name of the file."""


def open_regular(path: str | os.PathLike[str], most: int | None = None) -> IO[bytes]:
    """Return a regular file opened for reading; a link to one is one.

    Args:
        path: of the file.
        most: number of bytes that it may have; None for any.

    Raises:
        UnreadableError: it is missing, of another kind, too large, or no path at all; nothing was read.
    """
    try:
        _check(os.stat(path), most)
        file = open(path, "rb", opener=_opened)  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise UnreadableError(f"cannot be read: {_reason(path, error)}") from error
    except UnreadableError:
        raise
    except ValueError as error:  # a NUL, or a surrogate that stands for no byte
        raise UnreadableError("is no path of a file") from error
    try:
        _check(os.fstat(file.fileno()), most)  # what was opened may be another file than what was looked at
    except UnreadableError:
        file.close()
        raise
    return file


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | _NO_WAITING)


def _check(status: os.stat_result, most: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((words for test, words in _KINDS if test(status.st_mode)), "something else")
        raise UnreadableError(f"is {kind}, not a file")
    if most is not None and status.st_size > most:
        raise UnreadableError(f"has {status.st_size:,} bytes; at most {most:,} are read")


def _reason(path: str | os.PathLike[str], error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "the link leads nowhere" if os.path.islink(path) else "no such file"
    return os.strerror(error.errno) if error.errno else str(error)


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """Return what a regular file of at most so many bytes holds.

    Raises:
        UnreadableError: as `open_regular`, or reading fails.
    """
    with open_regular(path, most) as file:
        return read_stream(file, most)


def read_stream(stream: IO[bytes], most: int) -> bytes:
    """Return what an open file, or the standard input, still holds.

    Raises:
        UnreadableError: reading fails, or there is more than so many bytes.
    """
    try:
        content = stream.read(most + 1)
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror or error}") from error
    if len(content) > most:
        raise UnreadableError(f"has more than {most:,} bytes")
    return content


def check_path(path: str | os.PathLike[str]) -> None:
    """Check that a file or folder could be there, whatever is.

    Raises:
        UnreadableError: no file can have such a path: it is too long, a circle of links, or has a NUL in it.
    """
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UnreadableError(f"cannot be reached: {_reason(path, error)}") from error
    except ValueError as error:
        raise UnreadableError("is no path of a file") from error


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Whether there is a regular file, or a link to one; never an exception, whatever the path."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_inside(name: str, suffix: str = "") -> bool:
    """Whether a name that a file gives is that of a visible file beside it: no folder, no `..`, nothing absolute."""
    plain = not any(character in name for character in "/\\:\0") and not SURROGATE.search(name)
    return plain and bool(name) and not name.startswith(".") and name.endswith(suffix)
