"""What first values give on the task of the demo: `python benchmarks/inits.py` prints the table of docs/choosing.md.

The last blocks of all-MiniLM-L6-v2 and a new head learn to tell good movie reviews from bad ones; what the blocks below
make of the snippets is computed once.  For each way of starting, several learning rates are trained at once, as rows of
one batch, and the one with the lowest loss on snippets held out is taken; with it, several seeds (first values that are
drawn, and the order of the data) are trained at once and tested.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import lora_fx
from demo.sentiment import Reviews, fresh_model, read_reviews
from lora_fx.models.samples import Sample
from lora_fx.planning.recipes import RateProbe
from lora_fx.training.probing import probe_rates
from tests.support.performance import told

HEADS = ("start", "tuned rate", "loss while tuning", "test loss", "test accuracy", "least to most")
RATES = [1e-4 * 10 ** (number / 2) for number in range(6)]
SIZE, FIRST = 8, 8
"""Snippets in a batch; batches from which first values are made."""


@dataclass(frozen=True)
class Way:
    """A way to begin, or to train."""

    name: str
    init: str = "kaiming"
    rslora: bool = False
    lora_plus: float | None = None
    coarse: bool = False
    """On weights in four bits."""
    allocated: str = ""
    """Ranks by `lora_fx.allocate`: "spectrum" or "gradient"."""

    @property
    def rules(self) -> dict[str, Any]:
        lora = {"r": 8, "alpha": 16, "init": self.init, "rslora": self.rslora}
        head = {"match": {"name": "classifier"}, "lora": {"r": 2, "alpha": 32}}
        return {"rules": [{"match": {"name": "layers.**", "op": "linear"}, "lora": lora}, head]}


WAYS = (
    Way("LoRA (kaiming)"),
    Way("gaussian", "gaussian"),
    Way("orthogonal", "orthogonal"),
    Way("pissa", "pissa"),
    Way("pissa_niter_4", "pissa_niter_4"),
    Way("olora", "olora"),
    Way("eva", "eva"),
    Way("corda", "corda"),
    Way("corda_kpm", "corda_kpm"),
    Way("lora_ga", "lora_ga"),
    Way("LoRA, alpha / √r (rslora)", rslora=True),
    Way("LoRA+ (16)", lora_plus=16),
    Way("LoRA, ranks by spectrum", allocated="spectrum"),
    Way("LoRA, ranks by gradient", allocated="gradient"),
    Way("four bits: LoRA", coarse=True),
    Way("four bits: loftq", "loftq", coarse=True),
)


class Top(nn.Module):
    """The last blocks of the encoder, its pooler, and the head."""

    def __init__(self, model: nn.Module, blocks: int) -> None:
        super().__init__()
        self.layers, self.pooler, self.classifier = (
            model.bert.encoder.layer[-blocks:],
            model.bert.pooler,
            model.classifier,
        )

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.classifier(self.pooler(hidden))


@dataclass(frozen=True)
class Snippets:
    """What the lower blocks make of snippets, [tokens, width] each; labels are 1 for positive."""

    hidden: list[Tensor]
    labels: list[int]

    def batch(self, chosen: Sequence[int], width: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states, a mask that is added to scores, and labels; padded to a width."""
        rows = [self.hidden[at] for at in chosen]
        width = max(width, *map(len, rows))
        hidden = torch.stack([F.pad(row, (0, 0, 0, width - len(row))) for row in rows])
        there = torch.tensor([[at < len(row) for at in range(width)] for row in rows])
        mask = torch.zeros(len(rows), 1, 1, width).masked_fill(~there[:, None, None], torch.finfo(torch.float32).min)
        return hidden, mask, torch.tensor([self.labels[at] for at in chosen])

    def samples(self, order: Sequence[int]) -> list[Sample]:
        return [lora_fx.call(*self.batch(order[at : at + SIZE])[:2]) for at in range(0, len(order) - SIZE + 1, SIZE)]


@torch.no_grad()
def below(model: nn.Module, blocks: int, reviews: Reviews) -> Snippets:
    """Return what all but the last blocks of an encoder make of reviews."""
    hidden: list[Tensor] = [torch.empty(0)] * len(reviews.ids)
    order = reviews.sorted()
    for number, (inputs, _) in enumerate(reviews.batches(32, order)):
        states = model.bert(**inputs, output_hidden_states=True).hidden_states[-1 - blocks]
        for at, row in zip(order[32 * number :], states, strict=False):
            hidden[at] = row[: len(reviews.ids[at])].clone()
    return Snippets(hidden, reviews.labels)


def in_four_bits(model: nn.Module) -> nn.Module:
    """Return a copy whose adapted weights are rounded to 16 levels, 32 weights to a scale."""
    coarse = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (layer for layer in coarse.layers.modules() if isinstance(layer, nn.Linear)):
            groups = layer.weight.reshape(-1, 32)
            scale = groups.abs().amax(1, keepdim=True) / 7
            layer.weight.copy_(((groups / scale).round().clamp(-8, 7) * scale).reshape(layer.weight.shape))
    return coarse


class Task:
    """The data, and what is trained on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        model = fresh_model()
        reviews, self.tests = read_reviews(options.train + options.tune, options.test)
        whole = below(model, options.blocks, reviews)
        at = options.train
        self.train = Snippets(whole.hidden[:at], whole.labels[:at])
        self.tune = Snippets(whole.hidden[at:], whole.labels[at:])
        self.test = below(model, options.blocks, self.tests)
        self.base = Top(model, options.blocks).eval()
        self.coarse = in_four_bits(self.base)
        self.seeds: int = options.seeds

    def plan(self, way: Way) -> lora_fx.Plan:
        """Return the plan of a way, with first values from the first batches where it needs them."""
        base, first = self.coarse if way.coarse else self.base, self.train.samples(range(FIRST * SIZE))
        labels = {id(sample): self.train.labels[at * SIZE : (at + 1) * SIZE] for at, sample in enumerate(first)}

        def loss(logits: Tensor, sample: Sample) -> Tensor:
            return F.cross_entropy(logits, torch.tensor(labels[id(sample)]))

        rules: Any = way.rules
        if way.allocated:
            data = {"data": first, "loss": loss} if way.allocated == "gradient" else {"example_inputs": first[:1]}
            rules = lora_fx.allocate(base, rules, **data)
        if way.init == "loftq":
            return lora_fx.plan_from_data(base, rules, example_inputs=first[:1], original=self.base)
        if way.init in ("eva", "corda", "corda_kpm", "lora_ga"):
            return lora_fx.plan_from_data(base, rules, first, loss=loss if way.init == "lora_ga" else None)
        return lora_fx.plan(base, rules, first[:1])

    def probe(self, way: Way, plan: lora_fx.Plan, rates: Sequence[float]) -> RateProbe:
        """Return what rates come to: a pass over the training snippets, and the loss on those for tuning."""
        order = torch.randperm(len(self.train.labels), generator=torch.Generator().manual_seed(0)).tolist()
        held = range(len(self.tune.labels))
        batches = [*self.train.samples(order), *self.tune.samples(held)]
        known = [self.train.labels[at] for at in order[: len(order) // SIZE * SIZE]] + self.tune.labels
        labels = {id(sample): known[at * SIZE : (at + 1) * SIZE] for at, sample in enumerate(batches)}

        def loss(logits: Tensor, sample: Sample) -> Tensor:
            return F.cross_entropy(logits, torch.tensor(labels[id(sample)]))

        return probe_rates(self.coarse if way.coarse else self.base, plan, batches, loss, rates, way.lora_plus)

    def trained(self, way: Way, plan: lora_fx.Plan, rate: float) -> tuple[nn.Module, list[str]]:
        """Return a twin with an adapter for each seed, trained at once: rows of its own order of the data."""
        base, names = self.coarse if way.coarse else self.base, [f"seed{number}" for number in range(self.seeds)]
        torch.manual_seed(0)
        tuned = lora_fx.apply(base, plan)
        lora_fx.rename(tuned, "default", names[0])
        for number, name in enumerate(names[1:], start=1):
            torch.manual_seed(number)
            lora_fx.add(tuned, lora_fx.apply(base, plan), adapter=name)
        optimizers = [
            torch.optim.AdamW(lora_fx.param_groups(tuned, name, lr=rate, lora_plus=way.lora_plus)) for name in names
        ]
        count = len(self.train.labels)
        orders = [torch.randperm(count, generator=torch.Generator().manual_seed(n)).tolist() for n in range(len(names))]
        for at in range(0, count - SIZE + 1, SIZE):
            chosen = [one for order in orders for one in order[at : at + SIZE]]
            hidden, mask, labels = self.train.batch(chosen)
            with lora_fx.rows(tuned, [name for name in names for _ in range(SIZE)]):
                parts = zip(tuned.eval()(hidden, mask).split(SIZE), labels.split(SIZE), strict=True)
                torch.stack([F.cross_entropy(*part) for part in parts]).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return tuned, names

    @torch.no_grad()
    def tested(self, tuned: nn.Module) -> tuple[float, float]:
        """Return loss and accuracy on the test snippets, with what is in use."""
        order = sorted(range(len(self.test.labels)), key=lambda at: len(self.test.hidden[at]))
        labels, logits = torch.tensor(self.test.labels)[order], []
        for at in range(0, len(order), 32):
            logits.append(tuned.eval()(*self.test.batch(order[at : at + 32])[:2]))
        answers = torch.cat(logits)
        return F.cross_entropy(answers, labels).item(), (answers.argmax(-1) == labels).float().mean().item()


def head_alone(task: Task) -> tuple[str, ...]:
    """Return the line of the head alone, trained on fixed features: the usual baseline."""
    model, labels = copy.deepcopy(task.base).requires_grad_(False), torch.tensor(task.train.labels)
    with torch.no_grad():
        batches = [task.train.batch(range(at, min(at + 32, len(labels)))) for at in range(0, len(labels), 32)]
        seen: list[Tensor] = []
        hook = model.pooler.register_forward_hook(lambda *given: seen.append(given[2]))
        for hidden, mask, _ in batches:
            model(hidden, mask)
        hook.remove()
    features = torch.cat(seen)
    optimizer = torch.optim.AdamW(model.classifier.requires_grad_(True).parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(20):
        for chosen in torch.randperm(len(labels)).split(16):
            optimizer.zero_grad()
            F.cross_entropy(model.classifier(features[chosen]), labels[chosen]).backward()
            optimizer.step()
    loss, accuracy = task.tested(model)
    return "no adapter, the head alone", "", "", f"{loss:.3f}", f"{accuracy:.3f}", ""


def lines(task: Task, ways: Sequence[Way], rates: Sequence[float]) -> Iterator[tuple[str, ...]]:
    """Yield the lines of the table."""
    yield head_alone(task)
    for way in ways:
        plan = task.plan(way)
        probe = task.probe(way, plan, rates)
        if probe.how != "all in one batch":
            raise SystemExit(f"{way.name}: jobs ran {probe.how}")
        tuned, names = task.trained(way, plan, probe.best)
        results = []
        for name in names:
            with lora_fx.use(tuned, name):
                results.append(task.tested(tuned))
        losses, right = zip(*results, strict=True)
        edge = " (lowest)" if probe.best == min(rates) else " (highest)" if probe.best == max(rates) else ""
        span = f"{min(right):.3f} to {max(right):.3f}"
        line = (
            way.name, f"{probe.best:.1e}{edge}", f"{min(probe.losses):.3f}", f"{statistics.mean(losses):.3f}",
            f"{statistics.mean(right):.3f}", span,
        )  # fmt: skip
        print(" | ".join(line), file=sys.stderr, flush=True)
        yield line


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train", type=int, default=768, help="snippets to train on, once")
    parser.add_argument(
        "--tune", type=int, default=256, help="snippets by which the rate is chosen: a third of --train"
    )
    parser.add_argument("--test", type=int, default=1000, help="snippets to test on")
    parser.add_argument("--blocks", type=int, default=1, help="of the encoder, from the top, that are trained")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", metavar="NAME", help="of the first column: these alone")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into that page, between its marks")
    options = parser.parse_args(words)
    if options.tune * 3 != options.train or options.tune % SIZE:
        parser.error(f"--tune must be a third of --train, and a multiple of {SIZE}")
    torch.set_num_threads(options.threads)
    ways = [way for way in WAYS if options.ways is None or way.name in options.ways]
    told(options.write, "inits", [HEADS, *lines(Task(options), ways, RATES)])


if __name__ == "__main__":
    main()
