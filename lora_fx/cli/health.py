"""What is installed beside lora_fx, what is missing, and what is known to make trouble.  No torch here."""

import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from importlib import metadata

from lora_fx.text import columns, json_text

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[^\]]*\])?\s*(?P<versions>[^;]*)(;(?P<marker>.*))?")
_LEAST = re.compile(r">=\s*([\d.]+)")
_EXTRA = re.compile(r"""extra\s*==\s*["']([\w-]+)["']""")
_DEVELOPING = ("test", "lint", "docs", "browser", "fuzz")


@dataclass(frozen=True, slots=True)
class Package:
    """A package that lora_fx needs, always or for an extra."""

    name: str
    version: str
    """Empty where it is not installed."""
    least: str
    """The oldest version that will do."""
    extras: tuple[str, ...]
    """Those that want it; none where lora_fx always needs it."""

    @property
    def is_too_old(self) -> bool:
        return bool(self.version) and _numbers(self.version) < _numbers(self.least)


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """One thing that was tried."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Health:
    """What `lora-fx doctor` shows."""

    packages: tuple[Package, ...]
    trouble: tuple[str, ...]
    checks: tuple[HealthCheck, ...] = ()

    @property
    def is_well(self) -> bool:
        needed = all(package.version and not package.is_too_old for package in self.packages if not package.extras)
        return needed and all(check.passed for check in self.checks)

    def __str__(self) -> str:
        lines = [f"Python {platform.python_version()}, {platform.system()} {platform.machine()}", ""]
        lines.append(columns([_row(package) for package in self.packages]))
        tried = [(check.name, "works" if check.passed else "FAILS", check.detail) for check in self.checks]
        lines += ["", columns(tried)] if tried else []
        lines += ["", *(f"  {line}" for line in self.trouble)] if self.trouble else []
        return "\n".join([*lines, "", "all is well" if self.is_well else "something is wrong; see above"])

    def to_json(self) -> str:
        return json_text({"schema_version": 1, "well": self.is_well, **asdict(self)}, indent=1)


def _row(package: Package) -> tuple[str, str, str]:
    name, extras = package.name, package.extras
    need = f"for {', '.join(extras)}" if extras else "needed"
    if not package.version:
        return (name, "missing", f"{need}: pip install 'lora-fx[{extras[0]}]'" if extras else need)
    return (name, package.version, f"too old, {package.least} is needed" if package.is_too_old else need)


def installed() -> tuple[Package, ...]:
    """Return lora_fx itself and what it requires, by its own metadata; what only its developers need is left out."""
    own = Package("lora-fx", _version("lora-fx"), "", ())
    packages: dict[str, Package] = {}
    for package in map(_package, metadata.requires("lora-fx") or () if own.version else ()):
        if package.name != "lora-fx" and not set(package.extras) & set(_DEVELOPING):
            known = packages.get(package.name, package)
            packages[package.name] = replace(package, extras=tuple(sorted({*known.extras, *package.extras})))
    return (own, *sorted(packages.values(), key=lambda package: (package.extras, package.name)))


def _package(requirement: str) -> Package:
    match = _REQUIREMENT.match(requirement)
    assert match is not None
    least, extra = _LEAST.search(match["versions"]), _EXTRA.search(match["marker"] or "")
    name = match["name"]
    return Package(name, _version(name), least[1] if least else "", (extra[1],) if extra else ())


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def trouble() -> tuple[str, ...]:
    """Return what is known to go wrong with what is here."""
    lines = []
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        lines.append("no C++ compiler: torch.compile on CPU needs one; lora_fx itself does not")
    if sys.maxsize < 2**32:
        lines.append("a 32-bit Python: torch has no builds for it")
    return tuple(lines)
