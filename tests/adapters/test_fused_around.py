"""One adapted layer amid what people do with layers: transformations, compilers, checkpoints, hooks, copies, devices."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lora_fx
from tests.adapters.test_fused import IN, OUT, adapted, reference, tensors_of
from tests.support import zoo


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return reference(layer, x, None, tensors_of(layer))


def close(one: Any, other: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_transformations_of_torch_func():
    layer, x = adapted(), torch.randn(4, IN, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    close(torch.func.vmap(layer)(x), plain(layer, x))
    close(
        torch.func.grad(lambda x: layer(x).square().sum())(x),
        torch.func.grad(lambda x: plain(layer, x).square().sum())(x),
    )
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)["lora_A.default.weight"]
    for gradient, row in zip(gradients, x, strict=True):
        close(gradient, torch.autograd.grad(plain(layer, row).square().sum(), tensors_of(layer)["A"])[0])
    (slope,) = torch.autograd.grad(loss(parameters, x), tensors_of(layer)["B"])  # no transformation: fused
    close(slope, torch.autograd.grad(plain(layer, x).square().sum(), tensors_of(layer)["B"])[0])


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["lora", "dora"])
def test_many_gradients_at_once(options: dict[str, Any]):
    layer, x = adapted(**options), torch.randn(2, 3, IN, dtype=torch.float64)
    jacobian = functools.partial(torch.autograd.functional.jacobian, layer, x)
    close(jacobian(vectorize=True), jacobian())
    close(jacobian(vectorize=True), torch.autograd.functional.jacobian(lambda x: plain(layer, x), x))
    hessian = functools.partial(torch.autograd.functional.hessian, lambda x: layer(x).pow(3).sum(), x[0])
    close(hessian(vectorize=True), hessian())


def test_forward_mode():
    layer, x, tangent = adapted(), *torch.randn(2, 4, IN, dtype=torch.float64)
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    close(result, torch.func.jvp(lambda x: plain(layer, x), (x,), (tangent,))[1])


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")  # deprecated, and still used
def test_tracers_and_compilers_see_every_operation():
    from torch.fx.experimental.proxy_tensor import make_fx

    layer, x, other = adapted(), *torch.randn(2, 4, IN, dtype=torch.float64)
    expected = plain(layer, other)
    close(torch.jit.trace(layer, x)(other), expected)
    close(torch.fx.symbolic_trace(nn.Sequential(layer))(other), expected)
    close(torch.export.export(nn.Sequential(layer), (x,)).module()(other), expected)
    made = make_fx(layer)(x)(other)
    close(made, expected)
    made.sum().backward()
    close(tensors_of(layer)["A"].grad, torch.autograd.grad(expected.sum(), tensors_of(layer)["A"])[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layer_is_one_graph_with_the_same_gradients(backend: str):
    torch._dynamo.reset()
    layer, x = adapted(dora=True), torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    sources = [x, *tensors_of(layer).values()]
    gradients = torch.autograd.grad(torch.compile(layer, backend=backend, fullgraph=True)(x).square().sum(), sources)
    close(gradients, torch.autograd.grad(plain(layer, x).square().sum(), sources))


def gradients(layer: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x = torch.randn(4, IN, dtype=layer.weight.dtype, generator=torch.Generator().manual_seed(2)).requires_grad_()
    torch.manual_seed(3)
    return list(torch.autograd.grad(run(x).float().square().sum(), [x, *tensors_of(layer).values()]))


def leaf_gradients(layer: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """As `gradients`, by backward(): reentrant checkpoints know no other way."""
    x = torch.randn(4, IN, dtype=layer.weight.dtype, generator=torch.Generator().manual_seed(2)).requires_grad_()
    torch.manual_seed(3)
    layer.zero_grad()
    run(x).float().square().sum().backward()
    return [x.grad, *(tensor.grad for tensor in tensors_of(layer).values())]


def saving_products(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_checkpoints_of_all_kinds_give_the_same_gradients(dora: bool):
    layer = adapted(dropout=0.5, dora=dora)
    body = nn.Sequential(layer, nn.Tanh())
    expected = gradients(layer, body)
    for reentrant in (False, True):
        close(leaf_gradients(layer, lambda x, r=reentrant: checkpoint(body, x, use_reentrant=r)), expected)
    quiet = adapted(dora=dora)
    body = nn.Sequential(quiet, nn.Tanh())
    contexts = functools.partial(create_selective_checkpoint_contexts, saving_products)
    slopes = gradients(quiet, lambda x: checkpoint(body, x, use_reentrant=False, context_fn=contexts))
    close(slopes, gradients(quiet, body))


def test_saved_tensors_may_be_kept_elsewhere():
    layer = adapted(dropout=0.5, dora=True)
    expected = gradients(layer, layer)
    for context in (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy),
    ):
        with context, torch.no_grad():
            pass

        def run(x: Tensor, context: Any = context) -> Tensor:
            with context:
                return layer(x)

        close(gradients(layer, run), expected, 0.0)


def test_autocast_gives_the_dtype_of_autocast_and_a_backward_inside_of_it_works():
    layer = adapted(dtype=torch.float32, dora=True)
    expected = gradients(layer, layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, IN)).dtype == torch.bfloat16
        close(gradients(layer, layer), expected, 0.05)
    x = torch.randn(4, IN, generator=torch.Generator().manual_seed(2)).requires_grad_()
    loss = layer(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    close([x.grad, *(tensor.grad for tensor in tensors_of(layer).values())], expected, 1e-5)


def test_hooks_on_factors_and_dropout_fire():
    layer = adapted(dropout=0.5)
    seen: list[str] = []
    for name in ("lora_A", "lora_B", "lora_dropout"):
        handle = getattr(layer, name)["default"].register_forward_hook(lambda *_, name=name: seen.append(name))
        layer(torch.randn(4, IN, dtype=torch.float64))
        handle.remove()
    assert seen == ["lora_A", "lora_B", "lora_dropout"]
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    layer(torch.randn(4, IN, dtype=torch.float64))
    handle.remove()
    assert seen[3:] == ["Dropout", "LoRAFactor", "LoRAFactor", "Linear"], "a hook on all modules sees them too"


def test_hook_that_changes_what_a_factor_returns_is_obeyed():
    layer, x = adapted(), torch.randn(4, IN, dtype=torch.float64)
    layer.lora_B["default"].register_forward_hook(lambda module, given, result: result * 0)
    assert torch.equal(layer(x), layer.base_forward(x))


def test_hooks_on_the_parameter_fire_once_a_backward():
    layer = adapted()
    seen: list[str] = []
    A = tensors_of(layer)["A"]
    A.register_hook(lambda slope: seen.append("slope"))
    A.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    for _ in range(2):
        layer(torch.randn(4, IN, dtype=torch.float64)).sum().backward()
    assert seen == ["slope", "accumulated"] * 2


def test_step_in_the_backward_pass_is_a_step_after_it():
    def step(parameter: Tensor) -> None:
        parameter.data.sub_(0.1 * parameter.grad)

    layer, twin = adapted(), adapted()
    for tensor in tensors_of(layer).values():
        tensor.register_post_accumulate_grad_hook(step)
    x = torch.randn(4, IN, dtype=torch.float64)
    for module in (layer, twin):
        module(x).square().sum().backward()
    for mine, theirs in zip(tensors_of(layer).values(), tensors_of(twin).values(), strict=True):
        close(mine, theirs - 0.1 * theirs.grad)


def saved_whole(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("move", [copy.deepcopy, pickled, saved_whole])
def test_copy_of_a_model_in_training_goes_on_alike(move: Callable[[nn.Module], nn.Module]):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN))
    model = lora_fx.apply(base, zoo.rules(r=3, dropout=0.5, init="random"), backend="modules").train()
    x = torch.randn(4, IN)
    model(x).sum().backward()
    twin = move(model)
    results = []
    for either in (model, twin):
        torch.manual_seed(7)
        either.zero_grad()
        loss = either(x).square().sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in lora_fx.parameters(either))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"dropout": 0.5}], ids=["lora", "dora", "dropout"])
def test_without_gradients_the_values_are_the_same(options: dict[str, Any]):
    layer, x = adapted(**options), torch.randn(2, 3, IN, dtype=torch.float64)
    torch.manual_seed(3)
    expected = layer(x).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        torch.manual_seed(3)
        with context:
            close(layer(x), expected, 1e-12)
    layer.requires_grad_(False)
    torch.manual_seed(3)
    close(layer(x), expected, 1e-12)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"dropout": 0.5}], ids=["lora", "dora", "dropout"])
def test_meta_tensors_have_shapes(options: dict[str, Any]):
    layer = adapted(**options).to("meta")
    x = torch.randn(2, 3, IN, dtype=torch.float64, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.shape, x.grad.shape) == ((2, 3, OUT), x.shape)
    with torch.no_grad():
        assert layer(x).shape == (2, 3, OUT)


def test_base_weight_and_bias_that_are_trained_get_their_gradients():
    for name in ("weight", "bias"):
        layer, x = adapted(), torch.randn(4, IN, dtype=torch.float64)
        layer.get_parameter(name).requires_grad_(True)
        layer(x).square().sum().backward()
        cotangent = 2 * layer(x).detach()
        close(layer.get_parameter(name).grad, cotangent.t() @ x if name == "weight" else cotangent.sum(0))


class Labelled(Tensor):
    """A subclass that does nothing else than to be one."""


def test_tensor_subclasses_keep_their_say():
    layer, x = adapted(), torch.randn(4, IN, dtype=torch.float64)
    expected = layer(x).detach()
    assert isinstance(layer(x.as_subclass(Labelled)), Labelled)
    layer._parameters["weight"] = layer.get_parameter("weight").detach().as_subclass(Labelled)
    close(layer(x).as_subclass(Tensor), expected)


def test_parametrized_factor_is_computed_anew():
    class Half(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value / 2

    layer, x = adapted(), torch.randn(4, IN, dtype=torch.float64)
    expected = (layer(x) + layer.base_forward(x)) / 2
    nn.utils.parametrize.register_parametrization(layer.lora_B["default"], "weight", Half())
    close(layer(x), expected)


def test_probability_of_one_drops_everything():
    layer, x = adapted(dropout=0.5), torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    layer.lora_dropout["default"].p = 1.0
    y = layer(x)
    assert torch.equal(y, layer.base_forward(x))
    y.sum().backward()
    assert not tensors_of(layer)["A"].grad.any()


def test_eval_and_zero_probability_drop_nothing():
    layer, x = adapted(dropout=0.5), torch.randn(4, IN, dtype=torch.float64)
    expected = reference(layer, x, None, tensors_of(layer))
    close(layer.eval()(x), expected)
    layer.train().lora_dropout["default"].p = 0.0
    close(layer(x), expected)
    layer.lora_dropout["default"].p = 0.5
    assert not torch.allclose(layer(x), expected)


def test_anomaly_detection_and_mutation_of_saved_tensors():
    layer, x = adapted(dora=True), torch.randn(4, IN, dtype=torch.float64)
    layer(x).sum().backward()
    expected = tensors_of(layer)["A"].grad.clone()
    layer.zero_grad()
    with (
        torch.autograd.graph.allow_mutation_on_saved_tensors(),
        pytest.warns(UserWarning, match="Anomaly"),
        torch.autograd.detect_anomaly(),
    ):
        y = layer(x)
        x.zero_()
        y.sum().backward()
    assert torch.equal(tensors_of(layer)["A"].grad, expected)
