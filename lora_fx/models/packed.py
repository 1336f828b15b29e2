"""Linears of quantisation libraries: codes and scales that only their own forward multiplies by.

Such a layer is run as it is, and its weight shows itself as a `PackedWeight`: a tensor of the shape of W that holds
nothing, and reads the layer when somebody asks for numbers.  What a library's layer holds is told by its `CodeLayout`.
"""

import functools
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import LoraFxWarning, RefusedError
from lora_fx.models.codelayout import CodeLayout, bare
from lora_fx.models.compressed import SCHEME, settle_compressed_
from lora_fx.models.dtypes import name_of_dtype
from lora_fx.models.grids import Grid
from lora_fx.models.packings import KNOWN, NOT_RUN, found_on
from lora_fx.models.quantised import dequantised_parameters_, is_quantised
from lora_fx.models.shards import gather_held, is_sharded, is_sharded_by_rows, part_of
from lora_fx.models.swap import original_class, unswapped
from lora_fx.models.torch_internals import pytree, tensor_without_memory
from lora_fx.models.walking import modules_of, named_modules_of, parameters_in
from lora_fx.text import listing


class PackedWeight(Tensor):
    """The weight of a layer that holds codes: its shape and dtype, and the numbers when they are asked for.

    Any operation of torch's on it is one on its numbers.
    """

    layer: nn.Module
    """The layer that holds the codes."""

    @staticmethod
    def __new__(cls, layer: nn.Module, dtype: torch.dtype | None = None) -> "PackedWeight":
        """Return the weight of a packed layer, in a dtype; None: in the layer's own, float32 where it has lost it."""
        packing, codes = _packing(layer), _codes(layer)
        shape = _shape(layer)
        made: PackedWeight = tensor_without_memory(
            cls, shape, dtype=dtype or packing.dtype(layer) or torch.float32, device=codes.device
        )
        made.layer = layer
        return made

    def dequantize(self) -> Tensor:
        """Return the numbers that the codes stand for; gathered where codes are sharded: collective then."""
        with torch.no_grad():
            layer = _gathered(self.layer) if holds_shards(self.layer) else self.layer
            return _packing(layer).read(layer).to(self.dtype)

    def multiplied(self, x: Tensor) -> Tensor:
        """Return what the layer computes of x without its adapters: W x + b, by its own forward."""
        return own_forward(self.layer, x)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        args, kwargs = pytree.tree_map_only(PackedWeight, PackedWeight.dequantize, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight(of {original_class(self.layer).__name__}, {tuple(self.shape)}, {self.dtype})"


def is_packed(module: nn.Module) -> bool:
    """Whether the module is a linear that holds codes, whose forward is run as it is."""
    return _known(module) is not None


def is_packed_class(kind: Any) -> bool:
    """Whether a class without swaps is of such linears."""
    return _packing_of(kind) is not None


def problem_of(module: nn.Module) -> str | None:
    """Return why a packed layer cannot be adapted as it is; None if it can."""
    if _codes_or_none(module) is None:
        return "it holds no codes yet"
    return _packing(module).problem(module) or None


def faked(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a tensor without values like what the layer computes of x: its kernels are not run for it."""
    return x.new_empty(*x.shape[:-1], _shape(layer)[0])


def own_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a packed layer computes by the forward of its class.

    Raises:
        RefusedError: what its library asks of the codes is not there.
    """
    kind: Any = original_class(layer)
    if why := _packing(layer).broken(layer):
        advice = (
            "bitsandbytes' layers in 4 bits run there; or let each process hold all of it (DistributedDataParallel)"
        )
        raise RefusedError("a quantised layer does not run as it is held", [(kind.__name__, why)], advice)
    return _packing(layer).run(layer, x)


def held_weight(owner: nn.Module, name: str) -> Tensor:
    """Return a parameter of the module as it is held, also where it is offloaded; of a packed layer a PackedWeight."""
    if name == "weight" and is_packed(owner):
        return PackedWeight(owner)
    weight = owner._parameters[name]
    assert weight is not None
    return weight


def copies_of_packed(module: nn.Module) -> Iterator[tuple[object, object]]:
    """Yield what a copy of a layer shares or gets in another way, if it is a packed one."""
    packing = _known(module)
    if packing is not None and _codes_or_none(module) is not None:
        yield from packing.copied(module)


def settle_packed_(model: nn.Module) -> None:
    """Keep the packed layers of a copy from what would spoil its training, in place.

    Raises:
        RefusedError: naming what cannot be kept.
    """
    settle_compressed_(model)
    for module in modules_of(model):
        packing = _known(module)
        if packing is not None:
            packing.settle(module)


def quantised_alike(layer: nn.Module, weight: Tensor) -> nn.Module:
    """Return a packed layer with other numbers, quantised with the settings of this one, which stays unchanged.

    Its bias is this one's; it has no hooks and no adapters.  Collective where the codes of this one are sharded.
    """
    layer = _gathered(layer) if holds_shards(layer) else layer
    made = _packing(layer).again(layer, weight)
    own = {name: type(value)() for name, value in vars(made).items() if name in _OF_HOOKS or name == "_modules"}
    vars(made).update(own)
    for name in [name for name in vars(made) if name.startswith("lora_fx")]:
        del vars(made)[name]
    return made


def grid_kept_by(layer: nn.Module) -> Grid | None:
    """Return the grid on which a packed layer's numbers lie, if `quantised_alike` keeps it; else None."""
    return _packing(layer).grid(layer)


def make_plain_(model: nn.Module, layer: nn.Module, weight: Tensor) -> nn.Module:
    """Turn a packed layer without adapters into an nn.Linear with this weight, in place, and return it.

    Hooks and name stay.  Where Python cannot give it that class a new one stands in its places, with which it
    shares all that it holds.
    """
    bias = layer._parameters.get("bias")
    bias = bias if bias is not None else getattr(layer, "bias", None)
    rows, columns = _shape(layer)
    plain = nn.Linear(columns, rows, False, device="meta")
    take_hooks(plain, layer)
    plain.training = layer.training
    try:
        layer.__class__ = nn.Linear
    except TypeError:  # of quanto's, which are abstract classes too
        for module in modules_of(model):
            places = [name for name, child in module._modules.items() if child is layer]
            module._modules.update(dict.fromkeys(places, plain))
        vars(layer).clear()  # who holds it in another way computes with the same tables of parameters
        vars(layer).update(vars(plain), forward=functools.partial(nn.Linear.forward, layer))  # type: ignore[arg-type]
        layer = plain
    else:
        vars(layer).clear()
        vars(layer).update(vars(plain))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return layer


def take_hooks(layer: nn.Module, other: nn.Module) -> None:
    """Give a layer the hooks of another one, in place."""
    vars(layer).update({name: value for name, value in vars(other).items() if name in _OF_HOOKS})


_OF_HOOKS = frozenset(
    f"_{which}hooks{more}"
    for which in ("forward_", "forward_pre_", "backward_", "backward_pre_")
    for more in ("", "_with_kwargs", "_always_called")
)


def lost_dtype(layer: nn.Module, usual: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a packed layer's numbers; where it has lost it the usual one of its model, or float16."""
    return _packing(layer).dtype(layer) or usual or torch.float16


def usual_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of most floating point parameters of a model that are no adapter's; None without any."""
    return _most_usual(p for name, p in model.named_parameters() if "lora_" not in name)


def _most_usual(tensors: Iterable[Tensor]) -> torch.dtype | None:
    dtypes = Counter(tensor.dtype for tensor in tensors if tensor.is_floating_point())
    return max(dtypes, key=lambda dtype: dtypes[dtype], default=None)


def warn_of_two_dtypes(merged: nn.Module, tuned: nn.Module) -> None:
    """Say if layers that held codes are plain now in another dtype than most of the model: codes took an x of any."""
    paths = {f"{path}.weight" for path, _ in packed_layers(tuned)}
    usual = _most_usual(p for name, p in merged.named_parameters() if name not in paths)
    plain = {p.dtype for name, p in merged.named_parameters() if name in paths and p.is_floating_point()}
    if usual is not None and plain - {usual}:
        told = listing(map(name_of_dtype, plain))
        warnings.warn(
            f"merged layers are {told}, as what their codes stand for, and most other parameters {usual}: layers that "
            f"are plain take inputs of their own dtype alone; `.to({usual})` gives the merged model one",
            LoraFxWarning,
            stacklevel=4,
        )


def forget_quantiser(model: nn.Module) -> None:
    """Take transformers' notes of a quantiser off a model of which nothing is quantised any longer, in place.

    With them `save_pretrained` would write plain weights beside a config.json that calls them quantised.
    """
    config = vars(model).get("config")
    if getattr(config, "quantization_config", None) is None:
        return
    if left := [path for path, _ in packed_layers(model)]:
        warnings.warn(
            f"{listing(left)} stay quantised beside merged layers, which are plain: `save_pretrained` would call all "
            "them quantised, and `from_pretrained` read other weights; adapt all that is quantised, merge(…, "
            'requantize="same"), or lora_fx.export(tuned, path, "merged"), which writes plain weights alone',
            LoraFxWarning,
            stacklevel=4,
        )
        return
    if any(is_quantised(parameter) for parameter in model.parameters()):
        return
    for owner, names in ((config, _NOTES_OF_CONFIG), (model, _NOTES_OF_MODEL)):  # both are the copy's own
        for name in names:
            vars(owner).pop(name, None)


_NOTES_OF_CONFIG = ("quantization_config", "_pre_quantization_dtype", "_is_quantized")
_NOTES_OF_MODEL = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit",
                   "is_4bit_serializable", "is_8bit_serializable")  # fmt: skip


def packed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, layer) of every packed layer of a model."""
    return ((path, module) for path, module in named_modules_of(model) if is_packed(module))


def holds_shards(layer: nn.Module) -> bool:
    """Whether this process has a part of a packed layer's codes."""
    return is_sharded(_codes_or_none(layer))


def holds_other_shards(layer: nn.Module) -> bool:
    """Whether this process has a part of a packed layer's codes that is not rows of them."""
    return holds_shards(layer) and not is_sharded_by_rows(_codes(layer))


def part_beside_codes(layer: nn.Module, tensor: Tensor) -> Tensor:
    """Return rows of a tensor that every process has whole: those that go with the rows of a packed layer's codes.

    Where a process has all codes it is the tensor itself; nothing is sent.
    """
    codes = _codes_or_none(layer)
    return tensor if codes is None else part_of(tensor, codes)


def _gathered(layer: nn.Module) -> nn.Module:
    """Return a copy of a packed layer that holds all of its codes and scales; collective."""
    made: nn.Module = bare(layer)
    gather_held(made)
    return made


def values_in(model: nn.Module) -> dict[int, int]:
    """Return how many values each parameter stands for, by its identity: those of W where it holds codes."""
    return {id(parameter): parameter.numel() for parameter in parameters_in(modules_of(model))} | values_of_codes(model)


def values_of_codes(model: nn.Module) -> dict[int, int]:
    """Return how many values each parameter with codes stands for, by its identity."""
    layers = (layer for _, layer in packed_layers(model))
    held = ((layer, _codes_or_none(layer)) for layer in layers)
    return {id(codes): math.prod(_shape(layer)) for layer, codes in held if codes is not None}


def dequantised_(model: nn.Module) -> nn.Module:
    """Give the model plain parameters in place of all quantised ones, in place, and return it."""
    for _, layer in list(packed_layers(model)):
        make_plain_(model, layer, PackedWeight(layer, lost_dtype(layer, usual_dtype(model))).dequantize())
    dequantised = dequantised_parameters_(model)
    forget_quantiser(dequantised)
    return dequantised


def _shape(layer: Any) -> tuple[int, int]:
    return int(layer.out_features), int(layer.in_features)


def _packing(layer: nn.Module) -> CodeLayout:
    packing = _known(layer)
    assert packing is not None
    return packing


def _known(module: nn.Module) -> CodeLayout | None:
    if type(module) is nn.Linear and SCHEME not in vars(module):  # what most are is asked for often
        return None
    kind: Any = type(module)
    packing, may_not_run = _facts_of(kind) if torch.compiler.is_compiling() else _remembered_facts(kind)
    if packing is None and (may_not_run or SCHEME in module.__dict__):
        return found_on(module)
    return packing


def _codes(layer: nn.Module) -> Tensor:
    codes = _codes_or_none(layer)
    assert codes is not None
    return codes


def _codes_or_none(layer: nn.Module) -> Tensor | None:
    return _packing(layer).codes(layer)


def _packing_of(kind: Any) -> CodeLayout | None:
    """Return how the layers of a class hold their weight, if it computes by the forward of a class that is known."""
    return _found(kind) if torch.compiler.is_compiling() else _remembered(kind)  # torch.compile warns of caches


def _found(kind: Any) -> CodeLayout | None:
    for base in kind.__mro__:
        packing = KNOWN.get(f"{base.__module__}.{base.__qualname__}")
        if packing is not None:
            same: Any = getattr(kind, "forward", None), getattr(base, "forward", None)
            return packing if same[0] is same[1] else None
    return None


_remembered = functools.cache(_found)


def _facts_of(kind: Any) -> tuple[CodeLayout | None, bool]:
    """Return how the layers of a class hold their weight, and whether they may be of a library that does not run."""
    original: Any = unswapped(kind)
    return _packing_of(original), original.__module__.startswith(NOT_RUN)


_remembered_facts = functools.cache(_facts_of)
