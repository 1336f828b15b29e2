"""What of a model can be trained beside its sites: rows of embeddings, single biases."""

from collections.abc import Iterator

from torch import Tensor, fx, nn

from lora_fx.models.offload import offloading_hook
from lora_fx.models.quantised import is_quantised
from lora_fx.models.tensors import dotted
from lora_fx.models.ties import ties
from lora_fx.models.walking import all_names_of, all_parameters_of
from lora_fx.planning.planned import EmbeddingTable


def biases_in(model: nn.Module) -> tuple[tuple[str, int], ...]:
    """Return (name, number of parameters) of every parameter called `bias`; of a tied one the number stands once."""
    seen: set[int] = set()
    found = []
    for name, parameter in all_parameters_of(model):
        if name.rpartition(".")[2] == "bias" and parameter.is_floating_point():
            found.append((name, 0 if id(parameter) in seen else parameter.numel()))
            seen.add(id(parameter))
    return tuple(found)


def tables_in(model: nn.Module) -> Iterator[EmbeddingTable]:
    """Yield the weight of every embedding, under each of its names, and whether rows of it can be trained alone."""
    tied = ties(model)
    paths: dict[nn.Embedding, list[str]] = {}
    for path, module in all_names_of(model):
        if isinstance(module, nn.Embedding):
            paths.setdefault(module, []).append(path)
    for module, names in paths.items():
        weight = module._parameters.get("weight")
        own = {dotted(path, "weight") for path in names}
        others = tuple(name for name in tied.get(id(weight), ()) if name not in own)
        yield EmbeddingTable(
            paths=tuple(names),
            weight=dotted(names[0], "weight"),
            rows=module.num_embeddings,
            width=module.embedding_dim,
            tied=() if weight is None else _of_modules(model, others),
            padding=module.padding_idx,
            refusal=_refusal(model, module, weight, others),
        )


def _of_modules(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return one name for each module's parameter: a module may have several."""
    first = {(id(model.get_submodule(name.rpartition(".")[0])), name.rpartition(".")[2]): name for name in names[::-1]}
    return tuple(name for name in names if name in first.values())


def _refusal(model: nn.Module, module: nn.Embedding, weight: Tensor | None, tied: tuple[str, ...]) -> str:
    """Return why rows of an embedding cannot be trained alone; "" if they can."""
    owners = [module, *(model.get_submodule(name.rpartition(".")[0]) for name in tied)]
    if weight is None:
        return "its weight is computed (a parametrization), and has no rows of its own"
    if is_quantised(weight) or not weight.is_floating_point():
        return "its weight is quantised"
    if weight.shape != (module.num_embeddings, module.embedding_dim):
        return f"its weight is {list(weight.shape)} here, not {[module.num_embeddings, module.embedding_dim]}"
    if any(map(offloading_hook, owners)):
        return "its weight is offloaded, or tied to one that is"
    if any(isinstance(owner, fx.GraphModule) for owner in owners):
        return "its weight is tied to one that the graph of a GraphModule owns"
    return ""
