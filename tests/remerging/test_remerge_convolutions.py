"""remerge: the LoRAs of convolutions (LoCon) are folded in models and in graphs, or left alone with their reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import lora_fx
from lora_fx import passes
from lora_fx.remerging.graph import Remerge
from lora_fx.remerging.whole import remerged
from tests.support import foreign
from tests.support.foreign import randomised
from tests.support.remerged import needs

SCALING = 0.5
LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class LoCon(nn.Module):
    """A convolution and a product: A with its kernel, B with a kernel of 1."""

    def __init__(self, dims: int = 2, kernel: int = 3, biases: bool = False, **settings: object) -> None:
        super().__init__()
        layer = LAYERS[dims]
        self.conv = layer(6, 8, kernel, **settings)
        self.down, self.up = layer(6, 4, kernel, bias=biases, **settings), layer(4, 8, 1, bias=biases)
        self.dropout = nn.Dropout(0.1)

    def product(self, x: Tensor) -> Tensor:
        return self.up(self.down(self.dropout(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.product(x) * SCALING


class Tucker(LoCon):
    """Three factors: one of 1, one with the kernel, one of 1."""

    def __init__(self) -> None:
        super().__init__(padding=1)
        self.down, self.mid = nn.Conv2d(6, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def product(self, x: Tensor) -> Tensor:
        return self.up(self.mid(self.down(x)))


class OnTheWeight(LoCon):
    def forward(self, x: Tensor) -> Tensor:
        delta = (self.up.weight.flatten(1) @ self.down.weight.flatten(1)).view(self.conv.weight.shape)
        return F.conv2d(x, self.conv.weight + SCALING * delta, self.conv.bias)


class Twice(LoCon):
    """Two products, one of which is subtracted in place."""

    def __init__(self) -> None:
        super().__init__()
        self.down2, self.up2 = nn.Conv2d(6, 2, 3, bias=False), nn.Conv2d(2, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        result -= self.up2(self.down2(x))
        return result


CASES: dict[str, Callable[[], nn.Module]] = {
    "plain": LoCon,
    "strides": lambda: LoCon(stride=2, padding=1),
    "same, dilation": lambda: LoCon(padding="same", dilation=2),
    "kernel of 1": lambda: LoCon(kernel=1, stride=2),
    "one dimension": lambda: LoCon(1, padding=1),
    "three dimensions": lambda: LoCon(3),
    "biases": lambda: LoCon(biases=True),
    "Tucker": Tucker,
    "on the weight": OnTheWeight,
    "two products": Twice,
}
each_case = pytest.mark.parametrize("case", CASES)


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomised(nn.Sequential(make(), nn.ReLU()))


def image(case: str = "") -> Tensor:
    dims = {"one dimension": 1, "three dimensions": 3}.get(case, 2)
    return torch.randn(2, 6, *(7,) * dims, generator=torch.Generator().manual_seed(1))


def traced(model: nn.Module, x: Tensor, how: str) -> nn.Module | torch.export.ExportedProgram:
    if how == "fx":
        return fx.symbolic_trace(model)
    program = torch.export.export(model, (x,))
    return program if how == "export" else program.run_decompositions()


def assert_same(plain: nn.Module, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = model(x)
        assert (plain(x) - expected).abs().max() <= 2e-6 * expected.abs().max().clamp(min=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "how"), [*((case, how) for case in CASES for how in ("fx", "export")), ("plain", "decomposed")]
)
def test_product_beside_a_convolution_vanishes_from_a_graph(case: str, how: str):
    model, x = built(CASES[case]), image(case)
    result = remerged(traced(model, x, how))
    assert (result.folded, result.left) == (("0.conv",), ())
    assert set(result.model.state_dict()) == {"0.conv.weight", "0.conv.bias"}
    assert_same(result.model, model, x)


@each_case
def test_layer_becomes_its_convolution_in_a_model(case: str):
    model, x = built(CASES[case]), image(case)
    for inputs in (None, (x,)):
        result = remerged(model, inputs)
        assert (result.folded, result.left) == (("0",), ())
        assert type(result.model[0]) is type(model[0].conv)
        assert_same(result.model, model, x)
    weight = model[0].conv.weight
    assert torch.equal(weight, built(CASES[case])[0].conv.weight), "the given model stays as it is"


def test_folded_weight_is_the_sum():
    model = built(LoCon).double()
    plain = lora_fx.remerge(model)
    layer = model[0]
    product = torch.einsum("or,rikl->oikl", layer.up.weight.flatten(1), layer.down.weight)
    torch.testing.assert_close(plain[0].weight, layer.conv.weight + SCALING * product, rtol=1e-12, atol=1e-12)
    assert torch.equal(plain[0].bias, layer.conv.bias)


# -- what cannot be folded


class NonlinearBetween(LoCon):
    def product(self, x: Tensor) -> Tensor:
        return self.up(F.silu(self.down(x)))


class OfAnotherInput(LoCon):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(x)) + self.product(x)


class PlusRows(LoCon):
    """Adds a row along the last dimension, which is no bias of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(5))  # of an image of 7 columns

    def product(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) + self.row


def with_down(**settings: object) -> Callable[[], nn.Module]:
    kernel = settings.pop("kernel", 3)

    def make() -> nn.Module:
        layer = LoCon(padding=1)
        layer.down = nn.Conv2d(6, 4, kernel, bias=False, **settings)
        return layer

    return make


def in_groups(**settings: object) -> nn.Module:
    layer = LoCon(padding=1)
    layer.conv = nn.Conv2d(6, 8, 3, padding=1, groups=2)
    for name, groups in settings.items():
        old = getattr(layer, name)
        size = (old.in_channels, old.out_channels, old.kernel_size)
        setattr(layer, name, nn.Conv2d(*size, padding=old.padding, groups=groups, bias=False))
    return layer


GROUPS = (
    "the convolution has 2 groups, and its weight has for each output only the channels of one: there is no place for "
    "a product of all; train the layer with lora_fx to have one that can be folded"
)
LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "groups": (in_groups, GROUPS),
    "groups, A too": (lambda: in_groups(down=2), GROUPS),
    "groups, B too": (lambda: in_groups(up=2), GROUPS),
    "another kernel": (with_down(kernel=1), "its kernel is (1, 1), that of the convolution (3, 3)"),
    "other dilation": (with_down(padding=2, dilation=2), "its padding is (2, 2), that of the convolution (1, 1)"),
    "other borders": (
        with_down(padding=1, padding_mode="circular"),
        "its convolution is transposed, or pads with something else than zeros",
    ),
    "nonlinear": (NonlinearBetween, "silu is not linear"),
    "another input": (OfAnotherInput, "its input is x, the linear's is relu"),
    "rows": (PlusRows, "a row is added to what a convolution gives"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_no_change_of_the_convolution_is_left_alone_with_the_reason(case: str):
    make, reason = LEFT[case]
    graph = fx.symbolic_trace(randomised(make()))
    work = Remerge()
    assert not passes.run(graph, [work]).modified
    assert (work.folded, work.left) == ([], [("conv", reason)])
    result = remerged(randomised(nn.Sequential(make())), (image(),))
    assert (result.folded, result.left) == ((), (("0", reason),))


def test_active_dropout_is_the_reason_until_eval():
    model = built(LoCon).train()
    assert remerged(model).left == (("0", "dropout is active (p=0.1); put the model into eval mode"),)
    assert remerged(model.eval()).folded == ("0",)


class Residual(nn.Module):
    """A block of a ResNet, with a shortcut that is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.shortcut = nn.BatchNorm2d(8), nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.second(F.relu(self.norm(self.first(x))))


class Separable(nn.Module):
    """A depthwise and a pointwise convolution, and a bottleneck of two more."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.pointwise = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 16, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 2, 1), nn.Conv2d(2, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pointwise(F.relu(self.depthwise(x)))
        return y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))


@pytest.mark.parametrize("make", [Residual, Separable])
def test_blocks_of_ordinary_models_are_no_lookalikes(make: Callable[[], nn.Module]):
    for model in (built(make), fx.symbolic_trace(built(make))):
        result = remerged(model)
        assert (result.folded, result.left) == ((), ())


# -- as others write them


@needs("lycoris")
@pytest.mark.parametrize("how", ["module", "export"])
@pytest.mark.parametrize("options", [{}, {"use_tucker": True}], ids=["", "Tucker"])
@pytest.mark.parametrize("bypass", [None, True])
def test_convolutions_that_lycoris_took_over(bypass: bool | None, options: dict[str, object], how: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(245, 3))
    options = {"conv_dim": 4, "conv_alpha": 2.0, "bypass_mode": bypass, **options}
    network = foreign.lycoris(model, target=["Conv2d", "Linear"], **options)
    randomised(network)
    x = image()
    result = remerged(model.eval() if how == "module" else torch.export.export(model.eval(), (x,)))
    assert len(result.folded) == 3
    assert result.left == ()
    assert_same(result.model, model, x)
    assert set(result.model.state_dict()) == {f"{at}.{name}" for at in (0, 2, 4) for name in ("weight", "bias")}
    assert len(network.loras) == 3
    network.restore()
    with torch.no_grad():
        assert (result.model(x) - model(x)).abs().max() > 1e-3, "the products were there"


@needs("peft")
def test_convolution_of_peft_becomes_the_base_layer():
    import peft

    config = peft.LoraConfig(r=4, target_modules=["0"])
    model = randomised(peft.get_peft_model(nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()), config))
    result = remerged(model)
    assert result.left == ()
    assert [type(layer) for layer in result.model] == [nn.Conv2d, nn.ReLU]
    assert_same(result.model, model, image())


@needs("peft")
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_convolution_of_peft_in_groups_is_named():
    import peft

    config = peft.LoraConfig(r=4, target_modules=["0"])
    model = randomised(peft.get_peft_model(nn.Sequential(nn.Conv2d(6, 8, 3, groups=2)), config))
    assert remerged(model).left == (("base_model.model.0", GROUPS),)
