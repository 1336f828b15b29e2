"""What holds the modules of adapters, each by its adapter's name."""

from torch import nn


class AdapterDict(nn.ModuleDict):
    """Modules by the name of their adapter, which may be that of an attribute of ModuleDict, as `train` is."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._modules[name] = module  # type: ignore[assignment]
