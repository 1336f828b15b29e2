"""The architectures and hazards that lie beside a checkout, where they are present."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "zoo"


def load(name: str) -> ModuleType | None:
    """Return the module of that file name in the shared folder, or None where there is none."""
    path = FOLDER / f"{name}.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"shared_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
