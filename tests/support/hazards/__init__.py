"""Small modules on which a capture is easily silently wrong, each difficulty once.

control     Python that decides something: values, sizes, types, luck, time
modes       gradients, autocast, dropout and transforms inside a forward
written     what the module holds and its own forward changes
changed     attributes that somebody else changes
replaced    submodules, methods, hooks and parameters that somebody else replaces
outside     what lies outside of it: globals, closures, caches, flags
arguments   structures of arguments and results
tensors     unusual tensors, aliases, writes to arguments
"""

from __future__ import annotations

from tests.support.hazards import arguments, changed, control, modes, outside, replaced, tensors, written
from tests.support.hazards.base import Hazard

HAZARDS: list[type[Hazard]] = [
    value
    for module in (control, modes, written, changed, replaced, outside, arguments, tensors)
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, Hazard) and value is not Hazard
]
