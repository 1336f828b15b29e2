"""What training an adapted model takes on each device of a mesh of FSDP2 and tensor parallelism, before it is tried."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from lora_fx.api import Rules
from lora_fx.bench.subjects import loss_of
from lora_fx.capture.calls.ambient import no_collections
from lora_fx.discovery.study import planned_for
from lora_fx.errors import RefusedError
from lora_fx.meshes.groups import NOTHING, Groups, groups_of
from lora_fx.meshes.onedevice import KernelAttention, OneDevice
from lora_fx.meshes.pipelines import Pipeline, pipeline_of
from lora_fx.meshes.splits import Splits, splits_of
from lora_fx.models.dtypes import name_of_dtype
from lora_fx.models.fsdp import refuse_sharded
from lora_fx.models.joining import without_values_of
from lora_fx.models.offload import offloaded_in
from lora_fx.models.quantised import is_quantised
from lora_fx.models.samples import Sample, Samples, samples_for, samples_of, without_values
from lora_fx.models.torch_internals import pytree
from lora_fx.planning.budget import Budget, Mesh, StepCost
from lora_fx.planning.plan import Plan
from lora_fx.regions.candidates import outermost_blocks
from lora_fx.tuned import build
from lora_fx.tuned.optimizing import parameters


def budget(
    model: nn.Module,
    rules_or_plan: Rules | Plan,
    example_inputs: object = None,
    *,
    mesh: str | Mapping[str, int] | Mesh = "dp=1",
    tp_plan: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    optimizer_states: int = 2,
    micro_batches: int | None = None,
) -> Budget:
    """Return what a step of training takes on each device of a mesh: bytes and FLOPs; nothing is allocated.

    The adapted model runs on the meta device, both passes, with and without checkpointing, and everything that it makes
    is counted; a part of what tensor parallelism splits counts as a part.  Blocks run as modules; as graphs they keep
    less.  The page "Beyond one machine" of the documentation has the formulas.

    Args:
        model: as for `plan`, with or without values; it stays unchanged.
        rules_or_plan: as for `apply`.
        example_inputs: of one step of one device, as for `plan`, of which the first counts; with `pp` of a micro-batch.
            Models of transformers fill no KV cache unless `use_cache=True` is among them.
        mesh: `dp=8,tp=4`, or a dict: over `dp` devices `fully_shard` shards, block by block; `tp` share each layer;
            `pp` are the stages of a pipeline, with as many blocks each (not yet with `dp`).
        tp_plan: styles (`colwise`, `rowwise`…) by names or globs; None: that of a model of transformers.
        dtype: of the base's parameters; None leaves them as they are.
        optimizer_states: numbers that the optimiser keeps for each that is trained; AdamW keeps two.
        micro_batches: of a step of the pipeline (1F1B); None: as many as stages.

    Raises:
        RefusedError: no inputs, an axis that is not counted, a plan that splits nothing or what cannot be split, blocks
            that are no equal stages, quantised, sharded or offloaded weights, a GraphModule, a model that does not run
            on the meta device.
        LoraFxError: as `apply`.
    """
    wanted = Mesh.of(mesh)
    if type(optimizer_states) is not int or optimizer_states < 0:
        raise ValueError(f"optimizer_states is {optimizer_states!r}; it must be a whole number, not below 0")
    many = wanted.pp if micro_batches is None else micro_batches
    if type(many) is not int or many < 1:
        raise ValueError(f"micro_batches is {many!r}; it must be a whole number above 0")
    if wanted.pp == 1 and micro_batches is not None:
        raise ValueError(f"micro_batches is {many}, and the mesh ({wanted}) has no pp: a pipeline alone has them")
    _refuse_uncountable(model)
    samples = samples_for(model, None).items if example_inputs is None else samples_of(example_inputs)
    if not samples:
        advice = "give example_inputs; on the command line a factory gives them, or hf:DIRECTORY has tokens"
        raise RefusedError("there are no inputs to count a step with", advice=advice)
    empty = without_values_of(model)
    for parameter in empty.parameters():
        if dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    _choose_for_training(empty)
    base = {name for name, _ in (*empty.named_parameters(), *empty.named_buffers())}
    plan = planned_for(empty, rules_or_plan, samples[0], "modules")
    build.check_refusals(plan)
    tuned = build.build(empty, plan).train()
    splits = splits_of(tuned, wanted, tp_plan)
    return _Counted(plan, tuned, base, samples[0], wanted, splits, optimizer_states, many).budget()


def _refuse_uncountable(model: nn.Module) -> None:
    refuse_sharded(model, "a model that is sharded already is not counted", "count before it is sharded")
    if isinstance(model, fx.GraphModule):
        raise RefusedError("a GraphModule is not counted", advice="give the model that it was made from")
    codes = [(name, "is quantised") for name, parameter in model.named_parameters() if _holds_codes(parameter)]
    if codes:
        raise RefusedError("quantised weights are not counted", codes[:8], "give the model that it was quantised from")
    away = [(path, "is offloaded") for path in offloaded_in(model)]
    if away:  # its hooks would load them for each call
        raise RefusedError("weights that accelerate offloads are not counted", away[:8], "count before it does")


def _holds_codes(parameter: Tensor) -> bool:
    return is_quantised(parameter) or not (parameter.is_floating_point() or parameter.is_complex())


def _choose_for_training(model: nn.Module) -> None:
    """Let modules of transformers do what a step of training does, in place, where a call does not say it.

    They fill no KV cache, as under their own checkpointing; and experts multiply groups of rows: a loop over experts
    needs values.
    """
    root: Any = getattr(model, "config", None)
    changed: dict[int, Any] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        told: dict[str, object] = {"use_cache": False} if getattr(config, "use_cache", None) is True else {}
        if config is root and getattr(config, "_experts_implementation", None) is not None:
            told["_experts_implementation"] = "grouped_mm"
        if told and id(config) not in changed:
            changed[id(config)] = copy.copy(config)
            for name, value in told.items():
                setattr(changed[id(config)], name, value)
        if told:
            module.config = changed[id(config)]


@dataclass(frozen=True, slots=True)
class _Counted:
    """An adapted model on the meta device, whose bytes and steps are counted."""

    plan: Plan
    tuned: nn.Module
    base: set[str]
    """Names of the parameters and buffers that the base has."""
    sample: Sample
    mesh: Mesh
    splits: Splits
    optimizer_states: int
    micro_batches: int

    def budget(self) -> Budget:
        blocks = outermost_blocks(self.tuned)
        if self.mesh.pp > 1:
            return self._of_stages(blocks)
        groups = groups_of(self.tuned, blocks, self._whole) if self.mesh.dp > 1 else NOTHING
        plain = self._step((), groups)
        return self._with(lambda *_: True, groups.most, plain, self._step(blocks, groups) if blocks else None, blocks)

    def _of_stages(self, blocks: Sequence[str]) -> Budget:
        plain, checkpointed = pipeline_of(blocks, self.mesh.pp), pipeline_of(blocks, self.mesh.pp)
        steps = zip(self._stages(plain, ()), self._stages(checkpointed, blocks), strict=True)
        stages = tuple(
            self._with(partial(plain.has, number), 0, once, again, plain.paths[number])
            for number, (once, again) in enumerate(steps)
        )
        return replace(max(stages, key=lambda one: one.total(one.plain)), stages=stages)

    def _with(
        self,
        has: Callable[[str, Tensor], bool],
        gathered: int,
        plain: StepCost,
        checkpointed: StepCost | None,
        blocks: Sequence[str],
    ) -> Budget:
        """Return the budget of a device that has some of the parameters and buffers."""
        named = {name: p for name, p in self.tuned.named_parameters() if has(name, p)}
        trained = [p for p in named.values() if p.requires_grad]
        frozen = [p for name, p in named.items() if name in self.base and not p.requires_grad]
        others = [p for name, p in named.items() if name not in self.base and not p.requires_grad]
        gradients = sum(map(self._shard, trained))
        values = sum(map(self._shard, (*trained, *others)))
        buffers = {name: b.untyped_storage().nbytes() for name, b in self.tuned.named_buffers() if has(name, b)}
        added = sum(size for name, size in buffers.items() if name not in self.base)
        before = sum(p.nbytes for name, p in named.items() if name in self.base and p.requires_grad)
        return Budget(
            model=self.plan.model,
            source=self.plan.source,
            mesh=self.mesh,
            inputs=tuple(f"{name_of_dtype(given.dtype)} {list(given.shape)}" for given in self._inputs()),
            dtypes=tuple(sorted({name_of_dtype(p.dtype) for name, p in named.items() if name in self.base})),
            weights=sum(map(self._shard, frozen)) + sum(buffers.values()) - added + before,
            adapters=values + added,
            optimizer=self.optimizer_states * gradients,
            gradients=gradients,
            gathered=gathered,
            plain=plain,
            checkpointed=checkpointed,
            blocks=len(blocks),
            micro_batches=self.micro_batches,
        )

    def _inputs(self) -> Iterable[Tensor]:
        return _tensors(self.sample)

    def _whole(self, parameter: Tensor) -> int:
        """Return the bytes of a parameter that `fully_shard` has gathered."""
        return math.prod(self.splits.local(parameter, self.mesh.tp)) * parameter.element_size()

    def _shard(self, parameter: Tensor) -> int:
        """Return the bytes of the first device's part of a parameter: FSDP2 pads rows, so that all parts are equal."""
        shape = self.splits.local(parameter, self.mesh.tp)
        rows, *rest = shape or (1,)
        return -(-rows // self.mesh.dp) * math.prod(rest) * parameter.element_size()

    def _step(self, checkpointed: Sequence[str], groups: Groups) -> StepCost:
        device = self._device()
        kept = self._run(device, checkpointed, groups.followed(self.tuned, device), None)
        return StepCost(kept, device.peak, device.most, device.flops)

    def _stages(self, pipeline: Pipeline, checkpointed: Sequence[str]) -> list[StepCost]:
        device = self._device()
        self._run(device, checkpointed, pipeline.followed(self.tuned, device), pipeline)
        pipeline.check()
        return pipeline.costs(device, self.micro_batches)

    def _device(self) -> OneDevice:
        split = [p for p in self.tuned.parameters() if id(p) in self.splits.dims]
        return OneDevice(self.mesh.tp, self.tuned, split)

    def _run(self, device: OneDevice, checkpointed: Sequence[str], handles: list[Any], of: Pipeline | None) -> int:
        """Run both passes on the meta device; return the bytes that live between them."""
        sample = without_values(Samples((self.sample,), True, True)).items[0]
        for given, meta in zip(self._inputs(), _tensors(sample), strict=True):
            if not given.is_floating_point() and not given.is_meta:
                device.numbers.know(meta, given.detach().cpu())
        handles += [module.register_forward_hook(device.gathering) for module in self.splits.gathered]
        trained: list[Any] = list(parameters(self.tuned))
        handles += [parameter.register_post_accumulate_grad_hook(_drop) for parameter in trained]
        wrapped = [self.tuned.get_submodule(path) for path in checkpointed]
        for module in wrapped:
            module.forward = _checkpointed(module.forward)
        try:
            with torch.enable_grad(), no_collections(), device, KernelAttention():
                output: Any = self.tuned(*sample.args, **sample.kwargs)
                loss = loss_of(output)
                if of is not None:
                    of.between_passes(device, output)
                output = None
                kept = device.live
                loss.backward()  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever a forward takes exception to
            fact = [("(root)", f"{type(error).__name__}: {str(error).strip()[:300]}")]
            raise RefusedError("the model does not run on the meta device, so a step is not counted", fact) from error
        finally:
            for handle in handles:
                handle.remove()
            for module in wrapped:
                del module.forward
        return kept


def _checkpointed(forward: Callable[..., Any]) -> Any:
    """Return a forward whose activations are made again in the backward pass, where modes for functions have gone."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with KernelAttention():
            return forward(*args, **kwargs)

    return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)


def _drop(parameter: Tensor) -> Any:
    """Forget a gradient as soon as it is there: what they take is counted by itself."""
    parameter.grad = None


def _tensors(sample: Sample) -> list[Tensor]:
    """Return the tensors of a sample, one that is in it twice twice."""
    return [leaf for leaf in pytree.tree_leaves((sample.args, sample.kwargs)) if isinstance(leaf, Tensor)]
