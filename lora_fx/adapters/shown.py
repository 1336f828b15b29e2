"""What `print(tuned)` shows: the model's own tree, in which each adapted layer says what its adapter is.

`Linear(in_features=64, out_features=64, bias=True, lora r=8 scaling=2 adapter=default)`; the modules of the adapter
itself are left out.  Numbers of the plan alone, so it is fast, and the same on the meta device.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from lora_fx.adapters.attach import CHILDREN, STATE, AdapterState, Attached, attached_to
from lora_fx.adapters.dicts import AdapterHome
from lora_fx.adapters.parallel import given_to_shard
from lora_fx.adapters.reads import is_distributing
from lora_fx.models.swap import Swapped
from lora_fx.models.walking import as_usual
from lora_fx.text import visible


class ShowsAdapters(Swapped, nn.Module):
    """Mixin for a module with adapters: its class shows it as ever, and they stand among its facts."""

    def _replicate_for_data_parallel(self) -> Any:  # other threads will run the replica
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        state: AdapterState = self.__dict__[STATE]
        replica.__dict__[STATE] = replace(state, switch=state.switch.fixed())
        return replica

    @as_usual
    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Return what every module does; to torch's `distribute_module` the layer without adapters, which follow it."""
        if memo is None and is_distributing(sys._getframe(1)):
            return given_to_shard(self)
        modules: Iterator[tuple[str, nn.Module]] = super().named_modules(memo, prefix, remove_duplicate)
        return modules

    def __repr__(self) -> str:
        facts = list(adapter_facts(self))
        shell: Any = object.__new__(type(self))  # the module as it is, but for what is shown of it
        shell.__dict__.update(self.__dict__)
        shell.__dict__["_modules"] = {name: child for name, child in self._modules.items() if not _is_ours(name, child)}
        shell.__dict__["extra_repr"] = lambda: ", ".join(filter(None, (self.extra_repr(), *facts)))
        text = super(ShowsAdapters, shell).__repr__()
        return text if all(fact in text for fact in facts) else _with(text, facts)


def _is_ours(name: str, child: nn.Module | None) -> bool:
    return name in CHILDREN or isinstance(child, AdapterHome)


def _with(text: str, facts: list[str]) -> str:
    """Return the text of a class that has one of its own, with the facts."""
    inside = text.endswith(")") and "\n" not in text
    return f"{text[:-1]}, {', '.join(facts)})" if inside else f"{text} {', '.join(facts)}"


def adapter_facts(owner: nn.Module) -> Iterator[str]:
    """Yield a text for each adapted weight of a module: `lora r=8 scaling=2 adapter=default`."""
    state = owner.__dict__.get(STATE)
    for adapter in attached_to(owner):
        if not adapter.call:  # the first of several calls speaks for all
            share = 1.0 if state is None else state.switch.now().share(adapter.spec.adapter)
            how = " (off)" if not share else "" if share == 1 else f" weight={share:g}"
            yield visible(f"{_facts_of(adapter)}{how}")


def _facts_of(adapter: Attached) -> str:
    spec = adapter.spec
    words = [
        "lora" if spec.path_is_owner else f"{spec.parameter}: lora",
        f"r={spec.lora.r}",
        f"scaling={spec.scaling:g}",
    ]
    words += [f"adapter={spec.adapter}"]
    words += [f"slices={'+'.join(spec.slices.adapt)}"] if spec.slices is not None else []
    words += [f"dropout={spec.lora.dropout:g}"] if spec.lora.dropout else []
    words += [f"share={spec.lora.share}"] if spec.lora.share != "none" else []
    words += ["dora"] if spec.lora.dora else []
    words += ["lora_fa"] if spec.lora.lora_fa else []
    words += [f"invocation={list(spec.lora.invocation)}"] if spec.lora.invocation else []
    words += ["bias"] if adapter.trained_bias is not None else []
    words += [f"calls={spec.calls}"] if spec.calls else []
    return " ".join(words)
