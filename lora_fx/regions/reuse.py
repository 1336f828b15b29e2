"""Code that was written for a graph is used again for blocks of the same make, in models that come after.

Like a known graph it is a candidate: what it computes is compared with the forward of each model before it answers.
"""

from collections.abc import Collection, Hashable

from torch import nn

from lora_fx.adapters.attach import attached_to
from lora_fx.capture.calls.arguments import is_constant
from lora_fx.capture.captured import Captured
from lora_fx.models.layers import has_hooks
from lora_fx.models.walking import named_modules_of
from lora_fx.regions.candidates import structure_of
from lora_fx.regions.known import KNOWN
from lora_fx.regions.program import COMPILE, LIVENESS, LOSS, Program, make_program

_SETTINGS = frozenset({type(None), bool, int, float, str})
"""Types of attributes that passes may read of a module."""
_NEW_EACH_TIME = {COMPILE, LIVENESS, LOSS}
"""Optimisations whose code notes what has been proven of it."""


def program_for(captured: Captured, module: nn.Module, passes: Collection[str] = (), static: bool = False) -> Program:
    """Return what `make_program` does: nothing of it is proven, and what one learns is not known to another.

    Raises:
        AttributeError: as `make_program`.
    """
    key = None if _NEW_EACH_TIME.intersection(passes) else _make_of(module)
    codes = None if key is None else KNOWN.codes(captured)
    if codes is None:
        return make_program(captured, module, passes, static)
    found: Program | None = codes.of((key, tuple(passes), static))
    if found is None:
        found = make_program(captured, module, passes, static)
        codes.keep((key, tuple(passes), static), found.anew())
        return found
    return found.anew()


def _make_of(module: nn.Module) -> Hashable | None:
    """Return what is equal for modules of which the same code is written; None where that cannot be told.

    Passes read classes, hooks, settings and adapters.
    """
    facts: list[object] = [structure_of(module)]
    for _, inner in named_modules_of(module):
        own = inner.__dict__
        facts += (type(inner), has_hooks(inner), "forward" in own)
        for name, value in own.items():
            if type(value) in _SETTINGS or (type(value) is tuple and is_constant(value)):
                facts += (name, type(value), value)
        for parameter in inner._parameters.values():
            facts += (type(parameter), parameter is not None and parameter.requires_grad)
        if inner._modules:
            for adapter in attached_to(inner):
                facts += (adapter.spec.site, adapter.spec.slices, adapter.spec.rule)
    key = tuple(facts)
    try:
        hash(key)
    except TypeError:
        return None
    return key
