"""Which dimension of which parameter tensor parallelism splits: by a plan of transformers, or by one that is given."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lora_fx.adapters.attach import attached_to
from lora_fx.adapters.parallel import refuse_unshardable
from lora_fx.adapters.trained import holds_rows
from lora_fx.errors import RefusedError
from lora_fx.planning.budget import Mesh
from lora_fx.rules.globs import PatternError
from lora_fx.rules.patterns import NamePattern
from lora_fx.text import shortened

OUTPUTS = {
    "colwise": False,
    "packed_colwise": False,
    "colwise_gather_output": True,
    "colwise_rep": True,
    "embedding_colwise": True,
}
"""Styles that split a weight along its outputs, and whether the results are gathered."""
_INPUTS = ("rowwise", "packed_rowwise", "embedding_rowwise")
_NOTHING = ("replicate", "moe_tp_experts", "replicated_with_grad_allreduce")
"""Styles that split no parameter: what they send is not counted."""
_KNOWN = (*OUTPUTS, *_INPUTS, *_NOTHING)
_EMBEDDINGS = ("embedding_colwise", "embedding_rowwise")


@dataclass(slots=True)
class Splits:
    """What tensor parallelism splits in a model."""

    dims: dict[int, int] = field(default_factory=dict)
    """The dimension, by the id of the parameter."""
    gathered: list[nn.Module] = field(default_factory=list)
    """Modules whose outputs are gathered."""

    def local(self, tensor: Tensor, tp: int) -> tuple[int, ...]:
        """Return the shape of the first device's part, which is the largest."""
        shape, dim = list(tensor.shape), self.dims.get(id(tensor))
        if dim is not None:
            shape[dim] = -(-shape[dim] // tp)
        return tuple(shape)


def splits_of(model: nn.Module, mesh: Mesh, plan: Mapping[str, str] | None) -> Splits:
    """Return what is split of an adapted model; adapters go with their weights, as `parallelize_module` shards them.

    Args:
        model: stays unchanged.
        mesh: with a single device along `tp` nothing is split.
        plan: styles by name or glob of modules or parameters; None: the plan that a model of transformers brings.

    Raises:
        RefusedError: there is no plan, a name in it matches nothing, a style that is not counted, a weight or heads
            that do not divide, or an adapter that cannot be sharded with its weight.
    """
    found = Splits()
    if mesh.tp == 1:
        if plan:
            raise RefusedError("a plan of tensor parallelism needs a mesh with tp", [("mesh", str(mesh))])
        return found
    styles = dict(plan or getattr(model, "_tp_plan", None) or {})
    if not styles:
        advice = "give tp_plan, such as {'blocks.*.up': 'colwise', 'blocks.*.down': 'rowwise'}"
        raise RefusedError("the model brings no plan of tensor parallelism", [("mesh", str(mesh))], advice)
    problems = [(name, f"has the style {shortened(str(s))}") for name, s in styles.items() if s not in _KNOWN]
    if problems:
        raise RefusedError("styles that are not counted", problems, f"counted are {', '.join(_KNOWN)}")
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    problems = []
    for name, style in styles.items():
        matched = [*_matching(name, modules), *_matching(name, parameters)]
        if not matched and plan is not None:
            problems.append((name, "matches no module and no parameter"))
        for path in matched:
            problems += _split(path, style, modules, parameters, mesh.tp, found)
    problems += _heads(model, mesh.tp, found)
    if problems:
        raise RefusedError("this cannot be split", problems, "take another size of tp, or another plan")
    return found


def _matching(name: str, named: Mapping[str, object]) -> list[str]:
    try:
        pattern = NamePattern(name)
    except PatternError as error:
        raise RefusedError("a name of the plan of tensor parallelism cannot be read", [(name, str(error))]) from error
    return [path for path in named if path and pattern.matches(path)]


def _split(
    path: str,
    style: str,
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    tp: int,
    found: Splits,
) -> Iterator[tuple[str, str]]:
    """Note what one style splits; yield what cannot be."""
    if style in _NOTHING:
        return
    owner, bias = modules[path.rpartition(".")[0] if path in parameters else path], None
    weight = parameters.get(path)
    if weight is None:
        kinds = nn.Embedding if style in _EMBEDDINGS else (nn.Linear, nn.Embedding)
        if not isinstance(owner, kinds):
            yield path, f"{style} is not for {type(owner).__name__}"
            return
        weight, bias = owner._parameters["weight"], owner._parameters.get("bias")
    assert weight is not None
    along_outputs = style in OUTPUTS
    first_is_outputs = not isinstance(owner, nn.Embedding)
    dim = weight.dim() - (2 if along_outputs == first_is_outputs else 1)
    gathers = OUTPUTS.get(style, False) or isinstance(owner, nn.Embedding)
    if weight.shape[dim] % tp and not gathers:
        yield path, f"{weight.shape[dim]:,} {'outputs' if along_outputs else 'inputs'} do not divide by tp={tp}"
        return
    if holds_rows(owner):
        yield path, "rows of it are trained alone (`tokens:`), which is not sharded"
        return
    refuse_unshardable(owner)
    found.dims[id(weight)] = dim
    if along_outputs and bias is not None:
        found.dims[id(bias)] = 0
    if along_outputs and gathers:
        found.gathered.append(owner)
    for adapter in attached_to(owner):
        if owner._parameters.get(adapter.spec.parameter) is weight:
            factor = adapter.lora_B.weight if along_outputs else adapter.lora_A.weight
            found.dims[id(factor)] = 0 if along_outputs else 1
            if along_outputs and adapter.magnitude is not None:
                found.dims[id(adapter.magnitude.weight)] = 0


def _heads(model: nn.Module, tp: int, found: Splits) -> Iterator[tuple[str, str]]:
    """Yield the numbers of heads that do not divide: a device would have parts of heads."""
    config = getattr(model, "config", None)
    split = [
        path for path, module in model.named_modules() if any(id(p) in found.dims for p in module._parameters.values())
    ]
    if config is None or not any("attn" in path or "attention" in path for path in split):
        return
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % tp:
            yield name, f"{heads} heads do not divide by tp={tp}"
