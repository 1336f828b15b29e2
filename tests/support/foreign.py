"""LoRAs as others write them, and what only looks like one; all with random values, in eval mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize


def randomised(model: nn.Module) -> nn.Module:
    """Give every matrix small random values, in place, and put the model into eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    model.eval()
    return model


class LoRALayer(nn.Module):
    """The textbook: A [in, r], B [r, out], alpha · x A B."""

    def __init__(self, into: int, out: int, r: int = 4, alpha: float = 0.5, dropout: float = 0.0) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.zeros(into, r)), nn.Parameter(torch.zeros(r, out))
        self.alpha, self.dropout = alpha, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * (self.dropout(x) @ self.A @ self.B)


class LinearWithLoRA(nn.Module):
    def __init__(self, into: int = 16, out: int = 24, **lora: float) -> None:
        super().__init__()
        self.linear, self.lora = nn.Linear(into, out), LoRALayer(into, out, **lora)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


class LinearWithLoRAMerged(LinearWithLoRA):
    """The textbook's other form: the product is added to the weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight + self.lora.alpha * (self.lora.A @ self.lora.B).T
        return F.linear(x, weight, self.linear.bias)


class Transposed(nn.Module):
    """Raw parameters, all of them the other way round, the product subtracted from a difference."""

    def __init__(self, into: int = 16, out: int = 24) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.zeros(into, out)), nn.Parameter(torch.zeros(out))
        self.down, self.up = nn.Parameter(torch.zeros(4, into)), nn.Parameter(torch.zeros(out, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.b + x.matmul(self.W) - F.linear(x.matmul(self.down.t()) / 2.0, self.up)


class AddsInPlace(LinearWithLoRA):
    def forward(self, x: Tensor) -> Tensor:
        result = self.linear(x)
        result += self.lora(x)
        return result


class TwoAdapters(LinearWithLoRA):
    """Two products of different rank, summed first."""

    def __init__(self) -> None:
        super().__init__()
        self.other = LoRALayer(16, 24, r=2, alpha=-1.5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.lora(x) + self.other(x)) + self.linear(x)


class WithBiases(nn.Module):
    """Both factors bring a bias along."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(16, 24), nn.Linear(16, 4), nn.Linear(4, 24)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.base(x), self.b(self.a(x)), alpha=0.25)


class LowRank(nn.Module):
    """A parametrization W + scaling · B A, with the dropout as a mask of ones on A."""

    def __init__(self, into: int, out: int, scaling: float = 0.5) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(4, into)), nn.Parameter(torch.zeros(out, 4))
        self.register_buffer("mask", torch.ones(1, into))
        self.dropout, self.scaling = nn.Dropout(0.1), scaling

    def forward(self, weight: Tensor) -> Tensor:
        delta = torch.matmul(self.lora_B, self.lora_A * self.dropout(self.mask))
        return weight + delta.view(weight.shape) * self.scaling


def parametrized() -> nn.Module:
    linear = nn.Linear(16, 24)
    parametrize.register_parametrization(linear, "weight", LowRank(16, 24))
    return linear


class Stacked(nn.Module):
    """Three linears whose A stand in one matrix; B is apart."""

    def __init__(self, how: str = "chunk") -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.A = nn.Parameter(torch.zeros(12, 16))
        self.Bq, self.Bk, self.Bv = (nn.Parameter(torch.zeros(16, 4)) for _ in range(3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(x, self.A)
        a, b, c = {
            "chunk": lambda: inner.chunk(3, -1),
            "split": lambda: torch.split(inner, 4, dim=-1),
            "narrow": lambda: [inner.narrow(-1, 4 * index, 4) for index in range(3)],
            "slices": lambda: [inner[..., 4 * index : 4 * index + 4] for index in range(3)],
        }[self.how]()
        q, k, v = self.q(x) + F.linear(a, self.Bq), self.k(x) + F.linear(b, self.Bk), self.v(x) + F.linear(c, self.Bv)
        return torch.sigmoid(q) * k + v


class StackedAtTheCall(nn.Module):
    """Each A is a parameter of its own; they are put together when they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(16, 16), nn.Linear(16, 16)
        self.Aq, self.Av = nn.Parameter(torch.zeros(4, 16)), nn.Parameter(torch.zeros(3, 16))
        self.Bq, self.Bv = nn.Parameter(torch.zeros(16, 4)), nn.Parameter(torch.zeros(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        q, v = torch.split(F.linear(x, torch.cat([self.Aq, self.Av])), [4, 3], dim=-1)
        return torch.tanh(self.q(x) + q @ self.Bq.T) * (self.v(x) + v @ self.Bv.T)


class FusedProjection(nn.Module):
    """One linear for q, k and v; q and v have a product each, put together with zeros for k."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.A, self.Bq, self.Bv = (nn.Parameter(torch.zeros(*shape)) for shape in ((16, 8), (4, 16), (4, 16)))

    def forward(self, x: Tensor) -> Tensor:
        q, v = (x @ self.A).chunk(2, dim=-1)
        q, v = q @ self.Bq, v @ self.Bv
        return self.qkv(x) + torch.cat([q, q * 0.0, v], dim=-1)


class AddedToAPart(nn.Module):
    """One linear for q, k and v, whose parts get their products after the split."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.q, self.v = LoRALayer(16, 16), LoRALayer(16, 16, r=2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return torch.sigmoid(q + self.q(x)) * k + torch.tanh(v + self.v(x))


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = LinearWithLoRA(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


def between(layer: Callable[[], nn.Module]) -> nn.Module:
    """Return a model of a layer 16 → 24 with others around it."""
    return nn.Sequential(nn.Linear(16, 16), nn.GELU(), layer(), nn.ReLU(), nn.Linear(24, 16))


# -- of other libraries


def loralib_linear(**options: object) -> nn.Module:
    import loralib

    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "merge_weights": False, **options}
    return loralib.Linear(16, 24, **settings)


def loralib_merged_linear(**options: object) -> nn.Module:
    import loralib

    return loralib.MergedLinear(16, 24, r=4, enable_lora=[True, False, True], merge_weights=False, **options)


def peft_linear(**options: object) -> nn.Module:
    import peft

    return peft.get_peft_model(nn.Sequential(nn.Linear(16, 24)), peft.LoraConfig(target_modules=["0"], **options))


def lycoris(model: nn.Module, target: Sequence[str] = ("Linear",), **options: object) -> nn.Module:
    """Let LyCORIS take over the linears of the model, or layers of other classes, in place; return its network."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"target_module": [*target], "target_name": []})
    network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2.0, algo="lora", **options)
    network.apply_to()
    return network


# -- lookalikes


class Lookalike(nn.Module):
    """A linear and two thin matrices, combined in some way that is no LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 24)
        self.A, self.B = nn.Parameter(torch.zeros(4, 16)), nn.Parameter(torch.zeros(24, 4))
        self.row = nn.Parameter(torch.zeros(1, 4))
        self.scaling = nn.Parameter(torch.tensor(0.5))

    def product(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A), self.B)


class ActiveDropout(Lookalike):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.product(F.dropout(x, 0.1, training=True))


class OfAnotherInput(Lookalike):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(x)) + self.product(x)


class OneColumn(Lookalike):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + F.linear(F.linear(x, self.A), self.row)


class FactorUsedElsewhere(Lookalike):
    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x) + self.product(x)) * self.B.sum()


class InnerUsedElsewhere(Lookalike):
    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(x, self.A)
        return (self.fc(x) + F.linear(inner, self.B)) * inner.mean()


class TrainedScaling(Lookalike):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.scaling * self.product(x)


class TrainedScalingOfWeights(Lookalike):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight + self.scaling * (self.B @ self.A), self.fc.bias)


class DynamicScaling(Lookalike):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.product(x) * x.mean()


class NonlinearBetween(Lookalike):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + F.linear(torch.relu(F.linear(x, self.A)), self.B)


class OutputUsedElsewhere(Lookalike):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return (y + self.product(x)) * torch.sigmoid(y)


class SumUsedTwice(Lookalike):
    """The linear is in one sum twice."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return (y + y) + self.product(x)


class ProductUsedInAnotherSum(Lookalike):
    """The product is in two sums, of which one has another linear's output."""

    def forward(self, x: Tensor) -> Tensor:
        d = self.product(x)
        return torch.relu(self.fc(x) + d) * (torch.tanh(F.linear(x, self.B @ self.A)) + d)


class WeightUsedElsewhere(Lookalike):
    def forward(self, x: Tensor) -> Tensor:
        return (F.linear(x, self.fc.weight) + self.product(x)) * self.fc.weight.mean()


class TwoCallsOneProduct(Lookalike):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x) + self.product(x)) * self.fc(torch.tanh(x))


class TwoCallsTwoProducts(Lookalike):
    def __init__(self) -> None:
        super().__init__()
        self.second = LoRALayer(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return torch.relu(self.fc(x) + self.product(x)) * (self.fc(y) + self.second(y))


class NotThin(Lookalike):
    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.zeros(24, 16)), nn.Parameter(torch.zeros(24, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.product(x)


class BiasWithoutPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.a, self.b = nn.Linear(16, 24, bias=False), nn.Linear(16, 4), nn.Linear(4, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.b(self.a(x))
