"""What a piece of Python code names outside of itself, read off its bytecode."""

import dis
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType


@dataclass(frozen=True, slots=True)
class Named:
    """A global and the attributes that follow it: `base.FLAG`."""

    root: str
    attributes: tuple[str, ...]
    module: bool = False
    """Whether the root is a module that the code imports by itself."""


_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR")
_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL")
_SILENT = ("CACHE", "COPY", "SWAP", "EXTENDED_ARG", "PUSH_NULL")


@functools.lru_cache(maxsize=4096)
def named_by(code: CodeType) -> tuple[Named, ...]:
    """Return every global that the code reads or writes, with its attributes."""
    return tuple(dict.fromkeys(_named(code)))


def _named(code: CodeType) -> Iterator[Named]:
    imported: dict[str, str] = {}
    root, attributes, module = "", [], False
    previous = ""
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in _SILENT:
            continue
        if root and name in _ATTRIBUTES:
            attributes.append(instruction.argval)
            continue
        if root:
            yield Named(root, tuple(attributes), module)
        root, attributes, module = "", [], False
        if name in _GLOBALS:
            root = instruction.argval
        elif name == "IMPORT_NAME":
            previous = instruction.argval
        elif name == "IMPORT_FROM":
            yield Named(previous, (instruction.argval,), module=True)
        elif name == "STORE_FAST" and previous:
            imported[instruction.argval] = previous
        elif name == "LOAD_FAST" and instruction.argval in imported:
            root, module = imported[instruction.argval], True
        if name not in ("IMPORT_NAME", "IMPORT_FROM", "STORE_FAST"):
            previous = ""
    if root:
        yield Named(root, tuple(attributes), module)


@functools.lru_cache(maxsize=4096)
def compares_identity(code: CodeType) -> bool:
    """Whether the code asks `is` of two values of which neither is None, True, False or `...`."""
    before = ""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IS_OP" and before != "constant":
            return True
        if instruction.opname not in _SILENT:
            constant = instruction.opname == "LOAD_CONST" and type(instruction.argval) is not int
            before = "constant" if constant else instruction.opname
    return False


def codes_inside(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of the functions, lambdas and comprehensions that the code makes when it runs."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from codes_inside(constant)
