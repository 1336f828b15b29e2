"""Weights that are W + scaling · B A by torch.nn.utils.parametrize."""

from torch import nn
from torch.nn.utils import parametrize

from lora_fx.capture.captured import NotCaptured
from lora_fx.remerging.algebra.chains import refolded
from lora_fx.remerging.algebra.folds import find_folds
from lora_fx.remerging.algebra.operations import NotLinear
from lora_fx.remerging.algebra.running import close, finite
from lora_fx.remerging.modules import check_factors, read_module, result_of


def parametrized_modules(model: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """Return (path of the module, names of its tensors) for every module with tensors that parametrizations compute."""
    return [
        (path, tuple(module.get_submodule("parametrizations")._modules))
        for path, module in model.named_modules()
        if parametrize.is_parametrized(module)
    ]


def unparametrized(model: nn.Module, path: str, names: tuple[str, ...]) -> None:
    """Give the module plain parameters W + scaling · B A for all its parametrized ones, in place.

    Raises:
        NotLinear: a parametrization is something else; with an empty reason if none looks like a LoRA.
    """
    module = model.get_submodule(path)
    parameters = {name: _folded(model, module, name) for name in names}
    # remove_parametrizations changes the class, which the module has in common with its copies
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    module._parameters = {**parameters, **module._parameters}


def _folded(model: nn.Module, module: nn.Module, name: str) -> nn.Parameter:
    steps = module.get_submodule(f"parametrizations.{name}")
    try:
        read = read_module(steps, (), {})
    except NotCaptured as reason:
        raise NotLinear(None, "") from reason
    node = result_of(read)
    findings = find_folds(read)
    fold = next((fold for fold in findings.folds if fold.use is node), None)
    if fold is None or fold.part.transposed:
        raise NotLinear(node, next(iter(findings.left.values()), ""))
    check_factors(model, steps, read, fold.chains)
    stored = read.tensors[fold.part.name]
    parameter = nn.Parameter(refolded(stored, False, fold.chains), requires_grad=stored.requires_grad)
    if not finite([parameter]):
        raise NotLinear(None, "the folded weight has NaN or infinite values")
    computed = getattr(module, name)
    if not parameter.is_meta and not close(parameter.detach(), computed.detach(), parameter.dtype):
        raise NotLinear(None, "the folded weight is another than the parametrization gives")
    return parameter
