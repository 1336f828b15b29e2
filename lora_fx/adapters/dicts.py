"""What holds the modules of adapters, each by its adapter's name."""

from typing import Any

from torch import nn


class AdapterDict(nn.ModuleDict):
    """Modules by the name of their adapter, which may be that of an attribute of ModuleDict, as `train` is."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._modules[name] = module  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training":  # the mode, whatever an adapter is called
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)
