"""Random small modules as Python source, random calls of them, and the judge's view of each."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from tests.support.hazards.base import values
from tests.support.judging import EVALUATION, INFERENCE, INSIDE, TRAINING, Mode, Step, Trial

EXPRESSIONS = [
    "self.first({v})",
    "self.second({v})",
    "self.mlp({v})",
    "self.again({v})",
    "self.first(self.second({v}))",
    "F.linear({v}.contiguous(), self.peek.weight, self.peek.bias)",
    "{v} @ self.mix",
    "torch.matmul({v}, self.mix.T) + {w}",
    "{v} + {w}",
    "{v} * {w}",
    "{v} - 0.5 * {w}",
    "{v} * torch.sigmoid({w})",
    "{v} * self.scale",
    "{v} / self.config.divisor",
    "torch.tanh({v})",
    "F.gelu({v})",
    "F.silu({v}, inplace=False)",
    "{v}.softmax(-1)",
    "self.norm({v})",
    "F.layer_norm({v}, (d,))",
    "self.batch({v}.transpose(1, 2)).transpose(1, 2)",
    "{v}.transpose(1, 2).softmax(-1).transpose(1, 2)",
    "{v}.view(*{v}.shape[:-1], 2, -1).flip(-1).reshape({v}.shape)",
    "{v}.reshape(b * t, d).cumsum(-1).view(b, t, d)",
    "{v}.reshape(b, t * d).tanh().unflatten(1, (t, d))",
    "{v}.permute(1, 0, 2).contiguous().view(t, b * d).sigmoid().view(t, b, d).permute(1, 0, 2)",
    "torch.cat([{v}[:, : (t + 1) // 2], {w}[:, (t + 1) // 2 :]], 1)",
    "torch.cat({v}.chunk(2, -1)[::-1], -1)",
    "torch.cat([part * 0.5 for part in {v}.split([3, 5], dim=-1)], -1)",
    "torch.stack([{v}, {w}], -1).mean(-1)",
    "{v}.cumsum(1) / t",
    "{v} - {v}.mean(1, keepdim=True)",
    "{v} * {w}.amax((1, 2), keepdim=True)",
    "{v} + {w}.sum(-1, keepdim=True)",
    "{v} + {v}.std(-1, keepdim=True, unbiased=False)",
    "{v}.double().exp().clamp(max=9).float()",
    "{v}.to(torch.bfloat16).to({w}.dtype)",
    "{v}.masked_fill({w} > 0.4, 0.25)",
    "torch.where({v} > 0, {v}, {w})",
    "{v} + {w}.detach()",
    "{v}.roll(1, 1)",
    "{v}.flip(1) if t > 2 else {v}",
    "({v} @ {w}.transpose(1, 2) * d ** -0.5).softmax(-1) @ {v}",
    "torch.einsum('btd,bsd->bts', {v}, {w}).tril() @ {v} / t",
    "F.scaled_dot_product_attention({v}.unsqueeze(1), {w}.unsqueeze(1), {v}.unsqueeze(1)).squeeze(1)",
    "{v} * t ** -0.5",
    "{v} * max(b, 2)",
    "{v} + torch.arange(t, dtype={v}.dtype)[None, :, None] / 8",
    "{v} + {v}.new_ones(b, 1, d) * 0.5",
    "{v} + torch.zeros(t, 1).fill_(0.5)",
    "{v} + torch.full_like({w}, 0.125)",
    "F.dropout({v}, 0.25, self.training)",
    "F.dropout({v}, 0.0, self.training)",
    "self.drop({v})",
    "{v} + torch.rand_like({v})",
    "{v} * self.ema.clone()",
    "F.pad({v}, (0, 0, 1, 0))[:, :-1]",
    "F.conv1d({v}.transpose(1, 2), self.kernel, padding=1).transpose(1, 2)",
    "{v} if mask is None else {v} * mask.unsqueeze(-1)",
    "{v} * (2 if flag else 3)",
    "{v} + (extra or {{}}).get('shift', 0)",
    "{v} if pair is None else {v} * pair[0] + pair[1]",
    "sum(layer({v}) for layer in self.layers)",
    "{v} + {v}.index_select(1, torch.zeros(t, dtype=torch.long))",
    "torch.gather({v}, 2, {w}.argsort(-1))",
    "{v}.unbind(1)[0].unsqueeze(1).expand(b, t, d)",
    "{v}.new_zeros(b, t, d).copy_({w})",
    "self.half({v}, {w})",
]
"""Each gives a tensor [b, t, d] from such tensors `v` and `w`."""

STATEMENTS = [
    "{v} = {v}.clone(); {v}.mul_(0.5)",
    "{v} = {v}.clone(); {v}[..., :4] += 1",
    "{v} = {v}.clone(); {v}[:, 0] = 0",
    "{v} = {v} * 1; {v}.view(b, -1)[:, :3].zero_()",
    "{v} = {v} + 0; {v}.transpose(1, 2).add_(0.5)",
    "self.ema.mul_(0.5).add_({v}.detach().mean((0, 1)) / 2)",
    "self.ema.copy_({v}.detach()[0, 0])",
    "self.steps.add_(1)",
    "for layer in self.layers: {v} = {v} + layer({v})",
    "for index in range(3): {v} = torch.tanh(self.first({v})) * (index + 1)",
    "for index, layer in enumerate([self.first, self.second]): {v} = layer({v}) + index",
    "for part in ({w}, {v}): {v} = {v} + 0.5 * part",
    "half = (t + 1) // 2; {v} = {v} + {w}[:, :half].mean(1, keepdim=True)",
    "q, k = self.first({v}), self.second({v}); {v} = (q @ k.transpose(1, 2)).softmax(-1) @ {w}",
    "{v}, {w} = {w}, {v}",
]
BLOCKS = ["with torch.no_grad():", "with torch.enable_grad():", "with torch.autocast('cpu', enabled=False):"]
CONDITIONS = [
    "t > 4", "b == 1", "t % 2 == 0", "t == d", "self.training", "flag", "mask is None", "b < t",
    "extra is not None and 'shift' in extra", "pair is not None", "x.dtype == torch.float32",
    "self.config.mode == 'plain'", "self.limit > t", "torch.is_grad_enabled()", "isinstance(pair, tuple)",
    "x.is_contiguous()", "len(self.layers) > 1", "getattr(self, 'bonus', None) is None",
]  # fmt: skip
RARE = ["if x.sum() > 0: {v} = {v} + 1", "self.calls = self.calls + 1; {v} = {v} * self.calls"]
"""What cannot be in a graph."""
KINDS = ["expression"] * 60 + ["branch"] * 15 + ["region"] * 6 + ["statement"] * 18 + ["rare"]
RESULTS = ["{v}", "({v}, {w})", "{{'out': {v}, 'aux': [{w}, None]}}", "[{v}, t, None]", "({v}, {{'x': x, 'b': b}})"]

HEAD = """
class Settings:
    def __init__(self):
        self.mode, self.divisor = "plain", 2.0


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.gain = nn.Linear(8, 4), nn.Linear(4, 8), 0.5

    def forward(self, x):
        return self.down(F.relu(self.up(x))) * self.gain


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.again, self.peek = self.first, nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.layers = nn.ModuleList(LAYER() for _ in range(2))
        self.norm, self.batch, self.drop = nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Dropout(0.25)
        self.mix = nn.Parameter(torch.randn(8, 8) / 3)
        self.kernel = nn.Parameter(torch.randn(8, 8, 3) / 5)
        self.register_buffer("ema", torch.ones(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.scale, self.limit, self.calls, self.config = 1.5, 6, 0, Settings()

    def half(self, v, w):
        return self.mlp(v)[..., : v.shape[-1] // 2].repeat(1, 1, 2) + w

    def forward(self, x, mask=None, flag=False, extra=None, pair=None):
        b, t, d = x.shape
"""
TAIL = """

class Model(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x, **options):
        for block in self.blocks:
            result = block(x, **options)
            while not isinstance(result, torch.Tensor):
                result = result["out"] if isinstance(result, dict) else result[0]
            x = torch.tanh(result)
        return x
"""


@dataclass(frozen=True)
class RandomCall:
    """One call of a random module."""

    batch: int
    length: int
    options: frozenset[str]
    mode: Mode
    transposed: bool = False

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        b, t = self.batch, self.length
        x = values(t, b, 8, seed=b).transpose(0, 1) if self.transposed else values(b, t, 8, seed=t)
        given = {
            "mask": (values(b, t) > 0).float(),
            "flag": True,
            "extra": {"shift": values(8)},
            "pair": (values(b, 1, 1), values(8)),
        }
        return (x,), {name: given[name] for name in sorted(self.options)}

    def __str__(self) -> str:
        return f"{self.batch}×{self.length} {sorted(self.options)}{' transposed' if self.transposed else ''}"


@dataclass(frozen=True)
class RandomModule:
    """A module's source, how often its block is repeated (0: not in a list), and the calls to make."""

    source: str
    repeats: int
    samples: tuple[RandomCall, ...]
    calls: tuple[RandomCall, ...]

    def __repr__(self) -> str:
        calls = "\n".join(f"# call {call} {call.mode.name}" for call in self.calls)
        samples = "\n".join(f"# sample {call}" for call in self.samples)
        return f"\n{self.source}\n# repeats {self.repeats}\n{samples}\n{calls}\n"

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return self.scope["Block"]() if self.repeats == 0 else self.scope["Model"](self.repeats)

    @property
    def scope(self) -> dict[str, Any]:
        layer = "Inner" if self.repeats == 2 else "partial(nn.Linear, 8, 8)"  # blocks inside would be the regions
        return _scope(HEAD.replace("LAYER", layer) + self.source + TAIL)

    @property
    def regions(self) -> tuple[str, ...]:
        return tuple(f"blocks.{index}" for index in range(self.repeats)) or ("",)

    def runs(self) -> bool:
        """Whether the base takes the samples at all."""
        model = self.make().eval()
        try:
            for sample in self.samples:
                args, options = sample.arguments()
                model(*args, **options)
        except RuntimeError:  # a view that the strides do not allow
            return False
        return True

    def trial(self, **more: Any) -> Trial:
        steps = [Step(f"{call}", call.arguments, call.mode, seed=index) for index, call in enumerate(self.calls)]
        return Trial(
            self.make,
            lambda: [sample.arguments() for sample in self.samples],
            steps,
            rule="**",
            regions=self.regions,
            **more,
        )


_SCOPES: dict[str, dict[str, Any]] = {}


def _scope(source: str) -> dict[str, Any]:
    """Return what the source defines, the same at every call: one class each, as in a file."""
    if source not in _SCOPES:
        _SCOPES.clear()
        name = "<random module>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "partial": partial, "__name__": "random_module"}
        exec(compile(source, name, "exec"), scope)
        _SCOPES[source] = scope
    return _SCOPES[source]


@st.composite
def random_modules(draw: Callable[..., Any]) -> RandomModule:
    """Draw a module and the calls to judge it on."""
    body = draw(bodies())
    options = st.frozensets(st.sampled_from(["mask", "flag", "extra", "pair"]), max_size=2)
    common = draw(options)
    first = RandomCall(2, 5, common, INFERENCE)
    samples = (first, RandomCall(3, 7, common, INFERENCE)) if draw(st.booleans()) else (first,)
    sizes = st.sampled_from([(2, 5), (3, 7), (4, 6), (1, 5), (2, 1), (1, 1), (5, 8), (2, 9)])
    modes = st.sampled_from([INFERENCE, TRAINING, INSIDE, EVALUATION])
    calls = []
    for number in range(3):
        given = draw(options) if number == 2 else common
        calls.append(RandomCall(*draw(sizes), given, draw(modes), transposed=draw(st.integers(0, 9)) == 0))
    return RandomModule(body, draw(st.sampled_from([0, 0, 1, 2])), samples, (*calls, *calls[:2]))


@st.composite
def bodies(draw: Callable[..., Any]) -> str:
    """Draw the body of a forward."""
    lines: list[str] = []
    names = ["x"]
    for number in range(draw(st.integers(1, 5))):
        new = f"y{number}"
        kind = draw(st.sampled_from(KINDS))
        if kind == "expression":
            lines.append(f"{new} = {draw(expressions(names))}")
        elif kind == "branch":
            lines += [f"if {draw(st.sampled_from(CONDITIONS))}:", f"    {new} = {draw(expressions(names))}"]
            lines += ["else:", f"    {new} = {draw(expressions(names))}"]
        elif kind == "region":
            lines += [draw(st.sampled_from(BLOCKS)), f"    {new} = {draw(expressions(names))}"]
        else:
            lines.append(f"{new} = {draw(expressions(names))}")
            pool = RARE if kind == "rare" else STATEMENTS
            lines += draw(st.sampled_from(pool)).format(v=new, w=new if len(names) == 1 else names[-1]).split("; ")
        names.append(new)
    lines.append(f"return {draw(st.sampled_from(RESULTS)).format(v=names[-1], w=draw(st.sampled_from(names)))}")
    return "".join(f"        {line}\n" for line in lines)


@st.composite
def expressions(draw: Callable[..., Any], names: list[str]) -> str:
    """Draw an expression over the names: the latest is likely, so that programs are deep."""
    recent = st.sampled_from([*names, names[-1], names[-1]])
    return draw(st.sampled_from(EXPRESSIONS)).format(v=draw(recent), w=draw(st.sampled_from(names)))
