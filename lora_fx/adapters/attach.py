"""Put an adapter's modules beside a base weight, find them again, and take them away."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_fx.adapters.dicts import AdapterDict, AdapterHome, holding_modules, modules_beside
from lora_fx.adapters.factors.dora import DoRAMagnitude, fresh_magnitude
from lora_fx.adapters.factors.initialise import Kind, initialise
from lora_fx.adapters.factors.kinds import (
    CallFactors,
    Convolution,
    ConvolutionA,
    ConvolutionB,
    EmbeddingA,
    SharedFactor,
    SlicedB,
    TokenDropout,
)
from lora_fx.adapters.factors.lora import LoRAFactor, as_rows, low_rank_weight
from lora_fx.adapters.factors.moved import MovedA, MovedB
from lora_fx.adapters.factors.spec import AdapterSpec, ModelRecord
from lora_fx.adapters.rawweight.factored import Factored
from lora_fx.adapters.rawweight.views import WeightView
from lora_fx.adapters.selection import Switch
from lora_fx.adapters.trained import VALUES, added_rows, added_value
from lora_fx.errors import RefusedError
from lora_fx.models.fsdp import resharded
from lora_fx.models.offload import computing_device, keep_loaded, offloading_hook, stored_weight
from lora_fx.models.packed import PackedWeight, held_weight
from lora_fx.models.shards import gather_held, is_sharded, unsharded
from lora_fx.models.swap import unswap
from lora_fx.models.tensors import dotted
from lora_fx.models.twin import make_twin
from lora_fx.models.walking import all_parameters_of
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import PlannedSite
from lora_fx.rules.inits import is_moved

CHILDREN = ("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector")
STATE = "lora_fx_state"
"""Attribute of an adapted module: its AdapterState."""
SWITCH = "lora_fx_switch"
"""Attribute of an adapted model: its Switch, for whoever does not want to look through all its modules."""
READS = "lora_fx_reads"
"""Attribute of a class whose instances show these parameters with their adapters."""
ITSELF = "lora_fx_layer"
"""Attribute of an adapted layer that is called: the layer itself, for the graph of one layer alone."""
HOME = "_lora"
"""What the name of a raw parameter gets as its end in the name of the module that holds its adapter."""
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class AdapterState:
    """What an adapted module does at its next call.

    It is replaced and never changed, so that shallow copies of a module (the replicas of nn.DataParallel) go ways of
    their own.
    """

    switch: Switch
    """What the model uses of its adapters."""
    dense: bool = False
    """Whether torch's fused kernels read the weights in eval mode: they get a plain tensor there."""
    called: int | None = None
    """How often it has been called in this forward; None unless each call has an adapter of its own."""
    within: bool = False
    """Whether a forward of the whole model is running, for which calls are counted."""


@dataclass(frozen=True, slots=True)
class Attached:
    """One adapter where it sits: the module that owns the base weight, and the factors beside it."""

    owner: nn.Module
    home: nn.Module
    """What holds the factors: the owner itself, or the AdapterHome of a raw parameter."""
    spec: AdapterSpec
    lora_A: LoRAFactor
    lora_B: LoRAFactor
    dropout: nn.Module | None
    magnitude: DoRAMagnitude | None
    call: int | None = None
    """The call that it serves, where each has an adapter of its own."""

    @property
    def base_weight(self) -> Tensor:
        """The base weight W itself, also where the owner shows an adapted weight instead, or where it is offloaded."""
        return stored_weight(self.owner, self.spec.parameter)

    @property
    def stored_shape(self) -> torch.Size:
        """The shape of the base weight."""
        return held_weight(self.owner, self.spec.parameter).shape

    def trained(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the adapter that its rule trains: all but A of LoRA-FA."""
        held = self.parameters()
        if self.spec.lora.lora_fa:
            next(held)
        return held

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that belong to the adapter: A and B, and the site's bias if the rule trains it."""
        yield self.lora_A.weight
        yield self.lora_B.weight
        if self.magnitude is not None:
            yield self.magnitude.weight
        if self.trained_bias is not None:
            yield self.trained_bias

    @property
    def trained_bias(self) -> nn.Parameter | None:
        """The bias of the layer if the rule trains it."""
        if not self.spec.lora.bias or not self.spec.path_is_owner:
            return None
        added = added_value(self.owner, self.spec.adapter, "bias")
        return added if isinstance(added, nn.Parameter) else self.owner._parameters.get("bias")

    def lengths(self) -> Tensor | None:
        """Return DoRA's lengths of all outputs, as files hold them; None for plain LoRA."""
        magnitude = self.magnitude
        if magnitude is None or magnitude.rows is None:  # the base, which may be offloaded, is not asked for
            return None if magnitude is None else magnitude.weight.detach()
        return magnitude.of_all(as_rows(self.base_weight, self.spec.site.layout), magnitude.rows)

    def delta(self) -> Tensor:
        """Return ΔW = scaling · B A in float32 (float64 for float64 factors), in the shape of the base weight."""
        delta = low_rank_weight(self.lora_A.matrix, self.lora_B.matrix, self.spec.scaling)
        stored = delta.transpose(-1, -2) if self.spec.site.layout == "in_out" else delta
        return stored.reshape(self.stored_shape)


def low_rank_of(used: Sequence[tuple[Attached, float]]) -> Factored:
    """Return Σ weight · scaling · B A of adapters beside one weight, as it is stored."""
    first, spec = used[0][0], used[0][0].spec
    view = WeightView.of(tuple(first.stored_shape), spec.site.is_banked)
    A, B, rank, scaling = first.lora_A.matrix, first.lora_B.matrix, spec.rank, spec.scaling * used[0][1]
    if len(used) > 1:
        A = torch.cat([one.lora_A.matrix for one, _ in used], dim=-2)
        B = torch.cat([one.lora_B.matrix * (one.spec.scaling * share) for one, share in used], dim=-1)
        rank, scaling = A.shape[-2], 1.0
    return Factored.of(view, A, B, spec.site.layout, rank, scaling)


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of an adapter's parameters: the base's own, but float32 for half precision and quantised bases.

    A learning rate that suits LoRA moves bfloat16 parameters by less than their last bit.
    """
    return weight.dtype if weight.is_floating_point() and weight.dtype not in _HALF else torch.float32


def record_of(plan: Plan, model: nn.Module) -> ModelRecord:
    """Return the record that all adapters of the plan share; `model` tells which parameters were trained before."""
    trained = frozenset(name for name, p in all_parameters_of(model) if p.requires_grad)
    return ModelRecord(replace(plan, capture=None, first_values=None), trained, Switch(plan.adapters))


def spec_of(planned: PlannedSite, record: ModelRecord, weight: Tensor) -> AdapterSpec:
    """Return what the adapter at a planned site knows of itself; the weight is that of `held_weight`."""
    assert planned.lora is not None
    mixed = adapter_dtype(weight) != weight.dtype or isinstance(weight, PackedWeight)  # which takes an x of any dtype
    calls = (planned.calls or 0) if planned.per_call else 0
    return AdapterSpec(planned.site, planned.lora, planned.rule or "", mixed, record, planned.slices, calls)


def attach(owner: nn.Module, spec: AdapterSpec, weight: Tensor | None = None) -> None:
    """Add freshly initialised factors to the owner of a base weight, in place; no key of the owner changes.

    Adds `lora_A.<adapter>.weight` [r, in] and `lora_B.<adapter>.weight` [out, r] to the owner, or, for a raw parameter,
    to a module `<parameter>_lora` in it; where the rule asks for it a parameterless `lora_dropout.<adapter>` and, for
    DoRA, `lora_magnitude_vector.<adapter>.weight` [out], a convolution's [1, out, 1…]; all in the owner's mode (train
    or eval) and on the device on which it computes.  A of LoRA-FA requires no gradient.  `weight`: as of `held_weight`.
    """
    weight = held_weight(owner, spec.parameter) if weight is None else weight
    home, name = _home(owner, spec), spec.adapter
    first, second = zip(*[_factors(owner, weight, spec) for _ in range(spec.calls or 1)], strict=True)
    for factor in (*first, *second):
        factor.__dict__["of"] = spec  # what nn.Module asks of a value that is set, no spec is
    for A in first if spec.lora.lora_fa else ():
        A.weight.requires_grad_(False)
    _holder(home, "lora_A")[name] = CallFactors(first) if spec.calls else first[0]
    _holder(home, "lora_B")[name] = CallFactors(second) if spec.calls else second[0]
    if spec.lora.dropout:
        kind = TokenDropout if spec.site.op == "embedding" else nn.Dropout
        _holder(home, "lora_dropout")[name] = kind(spec.lora.dropout)
    if spec.lora.dora:
        values = unsharded(stored_weight(owner, spec.parameter)).to(first[0].weight.device)
        _holder(home, "lora_magnitude_vector")[name] = fresh_magnitude(values, first[0], second[0], spec)
    for child in CHILDREN:
        if (holder := home._modules.get(child)) is not None:
            holder.training = owner.training
            if not owner.training and (own := holder._modules.get(name)) is not None:
                own.train(False)


def _home(owner: nn.Module, spec: AdapterSpec) -> nn.Module:
    if spec.parameter == "weight":
        return owner
    home = owner._modules.get(spec.parameter + HOME)
    if isinstance(home, AdapterHome):
        return home
    home = AdapterHome(spec.parameter)
    home.train(owner.training)
    owner.add_module(spec.parameter + HOME, home)
    return home


def _holder(home: nn.Module, child: str) -> nn.ModuleDict:
    """Return what holds one kind of module for each adapter at a site, made now if need be."""
    holder = home._modules.get(child)
    if not isinstance(holder, nn.ModuleDict):
        holder = AdapterDict()
        home.add_module(child, holder)
    return holder


def _factors(owner: nn.Module, weight: Tensor, spec: AdapterSpec) -> tuple[LoRAFactor, LoRAFactor]:
    """Return fresh factors A and B for a weight."""
    device, dtype, is_banked = computing_device(owner, weight), adapter_dtype(weight), spec.site.is_banked

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    *bank, out_features = spec.site.shape[: 1 + is_banked]
    inner = spec.site.shape[1 + is_banked :]
    rows = sum(map(len, spec.parts)) or out_features
    A: LoRAFactor
    B: LoRAFactor
    if spec.site.op in ("conv1d", "conv2d", "conv3d") and isinstance(owner, Convolution):
        A = ConvolutionA(empty(spec.rank, *inner), spec, owner)
        B = ConvolutionB(empty(rows, spec.rank, *(1 for _ in inner[1:])), owner.groups)
    else:
        share = spec.lora.share
        values = empty(*([1] if share == "A" else bank), spec.rank, math.prod(inner))
        if is_moved(spec.lora.init):  # its values come when all adapters are there: `starting`
            return MovedA(empty(spec.lora.r, *inner).zero_(), spec), MovedB(empty(rows, spec.lora.r).zero_())
        if spec.site.op == "embedding" and isinstance(owner, nn.Embedding):
            A = EmbeddingA(values, spec, owner)
        else:
            A = SharedFactor(values, bank[0], spec) if share == "A" else LoRAFactor(values, spec)
        values = empty(*([1] if share == "B" else bank), rows, spec.lora.r)
        if spec.parts:
            B = SlicedB(values, spec.site.features[0], spec.parts)
        else:
            B = SharedFactor(values, bank[0]) if share == "B" else LoRAFactor(values)
    kind: Kind = "bank" if bank else "embedding" if spec.site.op == "embedding" else "matrix"
    initialise(A._parameters["weight"], B._parameters["weight"], spec.lora.init, kind)  # type: ignore[arg-type]
    return A, B


def attached_to(owner: nn.Module, called: str | None = None) -> Iterator[Attached]:
    """Yield every adapter beside a weight of the module, or that of a name, in the order of its children."""
    for home in () if isinstance(owner, AdapterHome) else _homes(owner):
        factors = home._modules.get("lora_A")
        for name, factor in () if factors is None else factors._modules.items():
            if called is None or name == called:
                yield from _attached(owner, home, name, factor)


def _homes(owner: nn.Module) -> list[nn.Module]:
    """Return what may hold factors of the weights of a module: itself, and the homes of its raw parameters."""
    return [owner, *[child for child in owner._modules.values() if isinstance(child, AdapterHome)]]


def _attached(owner: nn.Module, home: nn.Module, name: str, factor: nn.Module | None) -> Iterator[Attached]:
    if not isinstance(factor, (LoRAFactor, CallFactors)):  # somebody else's lora_A
        return
    second, dropout, magnitude = _partners(home, name)
    firsts = list(factor) if isinstance(factor, CallFactors) else [factor]
    seconds = list(second) if isinstance(second, CallFactors) else [second]
    for number, (A, B) in enumerate(zip(firsts, seconds, strict=True)):
        if isinstance(A, LoRAFactor) and A.spec is not None:
            assert isinstance(B, LoRAFactor)
            call = number if isinstance(factor, CallFactors) else None
            yield Attached(owner, home, A.spec, A, B, dropout, magnitude, call)


def attached(owner: nn.Module, parameter: str = "weight") -> Attached | None:
    """Return the first adapter beside one weight of the module (its first call's, if each has its own), or None."""
    return next((adapter for adapter in attached_to(owner) if adapter.spec.parameter == parameter), None)


def in_use(owner: nn.Module, parameter: str = "weight") -> list[tuple[Attached, float]]:
    """Return the adapters that the call which begins uses at one weight of the module, each with its weight."""
    state: AdapterState | None = owner.__dict__.get(STATE)
    if state is None:
        return []
    found = {one.spec.adapter: one for one in attached_to(owner) if one.spec.parameter == parameter and not one.call}
    return [(found[name], share) for name, share in state.switch.for_call().at(found)]


def _partners(home: nn.Module, adapter: str) -> tuple[nn.Module, nn.Module | None, DoRAMagnitude | None]:
    holders = [home._modules.get(name) for name in CHILDREN[1:]]  # torch.compile cannot read a `:=` in here
    lora_b, dropout, magnitude = [None if holder is None else holder._modules.get(adapter) for holder in holders]
    assert lora_b is not None
    assert magnitude is None or isinstance(magnitude, DoRAMagnitude)
    return lora_b, dropout, magnitude


def has_call_factors(owner: nn.Module) -> bool:
    """Whether each call of the module has an adapter of its own."""
    for home in _homes(owner):
        holder = home._modules.get("lora_A")
        for one in () if holder is None else holder._modules.values():
            if isinstance(one, CallFactors):
                return True
    return False


def shown_parameters(owner: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that the module shows with their adapters."""
    names: tuple[str, ...] = getattr(type(owner), READS, ())
    return names


def share_adapter(owner: nn.Module, other: nn.Module) -> None:
    """Let another module hold the adapter of the owner too, in place: the same modules."""
    for name in CHILDREN:
        if name in owner._modules:
            other.add_module(name, owner._modules[name])


def all_attached(model: nn.Module, called: str | None = None) -> Iterator[tuple[str, Attached]]:
    """Yield (path of the site, adapter) for every adapter in the model, in model order; a shared module once.

    With a name, of that one alone.
    """
    for path, module in holding_modules(model):
        for adapter in attached_to(module, called):
            yield (path if adapter.spec.path_is_owner else dotted(path, adapter.spec.parameter)), adapter


def adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return what the names of all that belongs to adapters begin with: the paths of their modules, each with a dot."""
    return tuple(
        f"{dotted(path, name)}."
        for path, module in model.named_modules(remove_duplicate=False)
        for adapter in attached_to(module)
        for name in (CHILDREN if adapter.home is module else (adapter.spec.parameter + HOME,))
    ) + tuple(f"{dotted(path, VALUES)}." for path, module in model.named_modules() if VALUES in module._modules)


def with_values(tuned: nn.Module) -> nn.Module:
    """Return the model itself; where accelerate offloads its factors, or FSDP2 shards them, a twin that holds them.

    Sharded ones are gathered, one at a time: every process must come by.  All else of the twin is as in the model.
    """
    factors = [adapter.lora_A for _, adapter in all_attached(resharded(tuned))]
    gathers = any(is_sharded(factor.weight) for factor in factors)
    if not gathers and not any(map(offloading_hook, factors)):
        return tuned
    if gathers and (rows := [(name, f"of '{adapter}'") for name, adapter, _ in added_rows(tuned)]):
        raise RefusedError("rows of embeddings (`tokens:`) are not gathered from shards", rows)
    twin = make_twin(tuned, freeze=False)
    for _, adapter in all_attached(twin):
        for holder in filter(None, (adapter.lora_A, adapter.lora_B, adapter.magnitude)):
            keep_loaded(holder)
            gather_held(holder)
    return twin


def adapted_owners(model: nn.Module) -> list[nn.Module]:
    """Return every module that owns a weight which is adapted, or was until its last adapter was dropped."""
    modules = modules_beside(model)
    return [module for _, module in modules if STATE in module.__dict__ or next(attached_to(module), None)]


def owner_path(path: str, adapter: Attached) -> str:
    """Return the path of the module that owns the weight of the site at `path`."""
    return path if adapter.spec.path_is_owner else path.rpartition(".")[0]


def detach(owner: nn.Module) -> None:
    """Take all adapters away from the owner and give it its own class back, in place; the base weights stay."""
    unswap(owner)
    owner.__dict__.pop(STATE, None)
    for name, child in list(owner._modules.items()):
        if name in CHILDREN or isinstance(child, AdapterHome):
            del owner._modules[name]


def holders_of(owner: nn.Module) -> Iterator[nn.ModuleDict]:
    """Yield what holds the modules of the adapters beside the weights of a module, each by the adapter's name."""
    for home in (owner, *(child for child in owner._modules.values() if isinstance(child, AdapterHome))):
        for child in (*CHILDREN, VALUES):
            holder = home._modules.get(child)
            if isinstance(holder, AdapterDict):
                yield holder


def is_adapted(model: nn.Module) -> bool:
    """Whether the model holds an adapter of ours."""
    return next(all_attached(model), None) is not None
