"""merge: base + scaling · B A x → a plain linear with W' = W + scaling · B A, a new Parameter."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from lora_fx.adapters.attach import STATE, Attached, all_attached, attached_to, detach, in_use, is_adapted, owner_path
from lora_fx.adapters.factors.lora import as_rows, folded_weight
from lora_fx.errors import InvariantError, MergeError
from lora_fx.models.packed import PackedWeight, holds_other_shards, is_packed, lost_dtype, make_plain_, usual_dtype
from lora_fx.models.quantised import dense, is_quantised
from lora_fx.models.shards import is_finite, is_sharded, part_of, whole
from lora_fx.models.tensors import dotted
from lora_fx.models.zero import is_of_zero3, is_partitioned
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.remove import erase_lora_nodes
from lora_fx.passes.sites import site_calls
from lora_fx.planning.planned import FROM_AN_INVOCATION
from lora_fx.progress.steps import step


@dataclass(frozen=True, slots=True)
class Merge(Pass):
    """Fold every adapter into its base weight.

    W' is accumulated in float32 and rounded once.  Ensures: no LoRA node or module is left; keys = base keys.
    """

    name: str = "merge"

    def requires(self, graph_module: fx.GraphModule) -> None:
        check_mergeable(graph_module)

    def run(self, editor: Editor) -> None:
        erase_lora_nodes(editor)
        sites = list(all_attached(editor.graph_module))
        _keep_other_readers(editor, [path for path, adapter in sites if adapter.spec.path_is_owner])
        for path, adapter in sites:
            weight, owner = folded([(adapter, 1.0)]), owner_path(path, adapter)
            name = dotted(owner, adapter.spec.parameter)
            editor.change_modules(owner, detach, path)
            if is_packed(layer := editor.graph_module.get_submodule(owner)):
                weight = weight.to(lost_dtype(layer, usual_dtype(editor.graph_module)))
                plain = functools.partial(make_plain_, editor.graph_module, weight=weight)
                editor.change_modules(owner, plain, path)
            editor.set_tensor(name, nn.Parameter(weight, name in adapter.spec.record.requires_grad), path)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        if is_adapted(graph_module):
            raise InvariantError("an adapter is left after merging", [(p, "") for p, _ in all_attached(graph_module)])


def _keep_other_readers(editor: Editor, paths: list[str]) -> None:
    """Let every other reader of an adapted weight (the embedding tied to a head) read it under a name that keeps it.

    torch.export reads tied parameters under one of their names.

    Raises:
        MergeError: naming every weight that has no other name.
    """
    merged = {f"{path}.weight" for path in paths}
    parameters = dict(editor.graph_module.named_parameters(remove_duplicate=False))
    calls = {node for _, node in site_calls(editor.graph_module)}
    nameless = []
    for node in [node for node in editor.graph.nodes if node.op == "get_attr" and node.target in merged]:
        weight, others = str(node.target), [user for user in node.users if user not in calls]
        names = (other for other, p in parameters.items() if p is parameters[weight] and other not in merged)
        name = next(names, None)
        if name is None:
            nameless += [(weight, f"{user.name} reads it too, and must not change") for user in others]
        elif others:
            site = weight.removesuffix(".weight")
            with editor.writing_after(node, site) as write:
                kept = write.graph.get_attr(name)
            editor.replace_uses(node, kept, site, but=lambda user: user in calls)
    if nameless:
        raise MergeError("merging would change more than the adapted sites; nothing was merged", nameless)


def used_at(owner: nn.Module) -> dict[str, list[tuple[Attached, float]]]:
    """Return the adapters that this thread uses beside the weights of a module, with their weights; in a graph all."""
    names = dict.fromkeys(adapter.spec.parameter for adapter in attached_to(owner))
    if STATE not in owner.__dict__:
        return {name: [(one, 1.0) for one in attached_to(owner) if one.spec.parameter == name] for name in names}
    return {name: used for name in names if (used := in_use(owner, name))}


def folded(used: Sequence[tuple[Attached, float]]) -> Tensor:
    """Return W + Σ weight · ΔW of adapters beside one weight, as W is stored: a new tensor without gradient.

    ΔW is scaling · B A (DoRA: m · V / ‖V‖ - W).  Accumulated in float32 (float64 for float64) and rounded once.  Of a
    quantised W it is a plain tensor: the numbers that W stands for, plus the change.  Of a sharded W it is sharded
    alike: each process makes ΔW from whole factors and adds its part; with DoRA W is gathered, for its lengths.
    """
    with torch.no_grad():
        weight = dense(used[0][0].base_weight)
        if len(used) == 1 and used[0][1] == 1:
            return _alone(used[0][0], weight)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        total = wide
        for adapter, share in used:
            change = part_of(adapter.delta(), wide) if adapter.magnitude is None else _alone(adapter, wide) - wide
            total = total + share * change
        return total.to(weight.dtype)


def _alone(adapter: Attached, weight: Tensor) -> Tensor:
    """Return the weight with one adapter in it."""
    if adapter.magnitude is None:
        return folded_weight(weight, part_of(adapter.delta(), weight))
    layout = adapter.spec.site.layout
    rows = as_rows(whole(weight), layout).flatten(1)
    merged: Tensor = as_rows(adapter.magnitude.merged(rows, adapter.lora_A.matrix, adapter.lora_B.matrix), layout)
    return part_of(merged.reshape(weight.shape).contiguous(), weight)


def check_mergeable(model: torch.nn.Module) -> None:
    """Raise MergeError, naming every site, if a merge would give NaN or infinite weights or has nothing to merge."""
    if not is_adapted(model):
        raise MergeError("the model has no adapter to merge")
    acting = [
        (path, f"'{one.spec.adapter}' {FROM_AN_INVOCATION}")
        for path, one in all_attached(model)
        if one.spec.lora.invocation and one.spec.record.switch.now().share(one.spec.adapter)
    ]
    if acting:
        advice = "lora_fx.use other adapters before, or lora_fx.save it: PEFT reads it as aLoRA"
        raise MergeError("an adapter with an invocation cannot be merged; nothing was merged", acting, advice)
    sites = [
        (path if used[0][0].spec.path_is_owner else dotted(path, used[0][0].spec.parameter), used)
        for path, owner in model.named_modules()
        for used in used_at(owner).values()
    ]
    if not sites:
        raise MergeError("no adapter is in use, so there is nothing to merge", advice="lora_fx.remove gives the base")
    bad: list[tuple[str, str]] = []
    with step("checking", len(sites), "weights") as doing:
        for path, used in sites:
            if (problem := _not_mergeable(used)) is not None:
                bad.append((path, problem))
            doing.advance(path)
    if bad:
        raise MergeError("merging would spoil the model; nothing was merged", list(dict.fromkeys(bad)))


def _not_mergeable(used: Sequence[tuple[Attached, float]]) -> str | None:
    if any(adapter.call is not None for adapter, _ in used):
        return "each call has an adapter of its own, and the one weight cannot hold them all"
    if any(adapter.lora_A.weight.is_meta for adapter, _ in used):
        return "on the meta device: no values to merge"
    if why := _taken_apart(used[0][0].base_weight):
        return why
    return None if is_finite(folded(used)) else "the merged weight has NaN or infinite values"


def _taken_apart(weight: Tensor) -> str:
    """Return why a weight of which this process holds a part cannot be merged into; empty if it can."""
    if is_partitioned(weight):
        return (
            "ZeRO-3 has partitioned its weight: lora_fx.save writes gathered adapters, lora_fx.merge_checkpoint folds"
        )
    if is_of_zero3(weight):
        return "ZeRO-3 has gathered its weight: its hooks would be in the merged model, and look for their parameters"
    if isinstance(weight, PackedWeight) and holds_other_shards(weight.layer):
        return "its codes are sharded, and not by rows: lora_fx.save, and merge beside the base that is not sharded"
    if is_sharded(weight) and is_quantised(weight.to_local()):  # type: ignore[attr-defined]
        return "its weight is quantised and sharded"
    return ""
