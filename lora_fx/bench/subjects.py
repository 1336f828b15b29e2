"""What is compared: one base in several forms, on the same weights, inputs and loss.

The lower bound LB is the frozen base with the gradient of its input, so that its backward pass goes through every
layer; no step with adapters can do with less.  All but full fine-tuning take that gradient: a step that left it out
would save part of the first layer only, and ratios would depend on the number of layers.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import all_attached
from lora_fx.api import ChosenBackend, Rules, apply
from lora_fx.capture.calls.objects import copied, tensors_in
from lora_fx.errors import RefusedError
from lora_fx.models.samples import Sample, dummy_samples, samples_of
from lora_fx.models.twin import make_twin
from lora_fx.tuned.optimizing import parameters

LB, AGAIN, OURS, MODULES, PEFT, FULL = "LB", "LB again", "lora_fx", "lora_fx, modules", "PEFT", "full fine-tuning"
SPREAD = 0.02
"""Standard deviation of B: with B = 0, A would get no gradient."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is measured, and what it is called with."""

    name: str
    model: nn.Module
    sample: Sample
    leaf: Tensor | None = None
    """The input that takes a gradient; None where an embedding's output does, or nothing."""

    def forward(self) -> Tensor:
        """Return the loss of a forward pass."""
        return loss_of(self.model(*self.sample.args, **self.sample.kwargs))

    def step(self) -> None:
        """Run both passes; there is no optimiser."""
        self.model.zero_grad(set_to_none=True)
        if self.leaf is not None:
            self.leaf.grad = None
        self.forward().backward()  # type: ignore[no-untyped-call]

    def own(self) -> Iterator[Tensor]:
        """Yield parameters and buffers."""
        yield from self.model.parameters()
        yield from self.model.buffers()


def loss_of(output: object) -> Tensor:
    """Return the loss that an output holds, or else a mean of squares of its first floating point tensor.

    Of every second number: all squares of what ends in a LayerNorm have the same mean, whose gradient is nothing but
    rounding errors.
    """
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        loss: Tensor = output["loss"]
        return loss
    first = next(floating(output), None)
    if first is None:
        raise RefusedError("the model's output holds no floating point tensor, so there is no loss to measure with")
    return first if first.dim() == 0 else first[..., ::2].square().mean()


def floating(value: Any) -> Iterator[Tensor]:
    """Yield the floating point tensors in a value, in order."""
    return (tensor for tensor in tensors_in(value) if tensor.is_floating_point())


@dataclass(frozen=True, slots=True)
class FrozenBase:
    """The frozen model that all subjects are made of, its inputs, and where its backward pass ends."""

    model: nn.Module
    sample: Sample
    embedding: str | None
    """Path of the embedding that is called first: its output takes a gradient, as does the first floating input."""

    @staticmethod
    def of(model: nn.Module, example_inputs: object = None, dtype: torch.dtype | None = None) -> "FrozenBase":
        """Return the base of a model, on its weights; the model itself stays unchanged.

        Args:
            model: with values; in float32, if it is to be measured in another dtype.
            example_inputs: as for `lora_fx.plan`, of which the first sample is taken; None: those of the model's class.
            dtype: of weights and floating point inputs; None leaves them as they are.

        Raises:
            RefusedError: there are no inputs, no values, or nothing that a backward pass could end at.
        """
        if any(parameter.is_meta for parameter in model.parameters()):
            raise RefusedError("the model has no values, which a step needs", advice="give a model that is not on meta")
        samples = dummy_samples(model) if example_inputs is None else samples_of(example_inputs)
        if samples is None:
            raise RefusedError(
                "there are no inputs to measure with", advice="let the factory return (model, example_inputs)"
            )
        twin, sample = make_twin(model).train(), samples[0]
        if dtype is not None:
            twin, sample = twin.to(dtype), _converted(sample, dtype)
        base = FrozenBase(twin, sample, _first_embedding(twin, sample))
        if base.embedding is None and not list(floating([sample.args, sample.kwargs])):
            raise RefusedError(
                "a backward pass has nowhere to go: no input is of floating point, and no nn.Embedding is called"
            )
        return base

    def frozen(self, name: str) -> Subject:
        """Return the base itself, as the lower bound."""
        return self.subject(name, make_twin(self.model))

    def full(self) -> Subject:
        """Return the base with a gradient for every weight, and none for the inputs."""
        model = make_twin(self.model)
        for parameter in model.parameters():
            if parameter.is_floating_point() and type(parameter) is nn.Parameter:
                parameter.requires_grad_(True)
        return Subject(FULL, model, self.sample)

    def adapted(self, name: str, rules: Rules, backend: ChosenBackend = "auto") -> Subject:
        """Return the base with adapters by the rules, B random."""
        tuned = apply(self.model, rules, _leafed(self.sample)[0], backend)
        for _, adapter in all_attached(tuned):
            nn.init.normal_(adapter.lora_B.weight, std=SPREAD)
        return self.subject(name, tuned)

    def subject(self, name: str, model: nn.Module) -> Subject:
        """Return the model with the base's inputs, of which the first floating one takes a gradient."""
        sample, leaf = _leafed(self.sample)
        if self.embedding is not None:
            model.get_submodule(self.embedding).register_forward_hook(_with_gradient)
        return Subject(name, model, sample, leaf)


def copy_adapters(source: nn.Module, target: nn.Module) -> None:
    """Give the adapted target the values of what is trained in the source, in place."""
    with torch.no_grad():
        for ours, theirs in zip(parameters(target), parameters(source), strict=True):
            ours.copy_(theirs)


def _with_gradient(module: nn.Module, args: Any, output: Any) -> Any:
    """Let a gradient be taken of an embedding's output."""
    if not torch.is_grad_enabled() or not isinstance(output, Tensor) or output.requires_grad:
        return output
    return output.detach().requires_grad_()


def _first_embedding(model: nn.Module, sample: Sample) -> str | None:
    """Return the path of the embedding that a forward pass calls first."""
    called: list[str] = []
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                hooks.enter_context(module.register_forward_hook(lambda *_, path=path: called.append(path)))
        model(*sample.args, **sample.kwargs)
    return next(iter(called), None)


def _leafed(sample: Sample) -> tuple[Sample, Tensor | None]:
    """Return the sample with its first floating point tensor as a leaf that takes a gradient, and the leaf."""
    first = next(floating([sample.args, sample.kwargs]), None)
    if first is None:
        return sample, None
    leaf = first.detach().clone().requires_grad_()
    return _mapped(sample, lambda tensor: leaf if tensor is first else tensor), leaf


def _converted(sample: Sample, dtype: torch.dtype) -> Sample:
    return _mapped(sample, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _mapped(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    args, kwargs = copied((sample.args, sample.kwargs), change)
    return Sample(args, kwargs)
