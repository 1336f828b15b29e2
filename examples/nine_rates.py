"""Nine learning rates in one run: nine adapters share each forward and backward pass of the encoder.

Each ends as if it had been trained alone.  The reviews and the encoder are those of `make demo`; a table of the losses
and a picture, nine_rates.svg, come out.
"""

import sys
from pathlib import Path
from tempfile import gettempdir

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import lora_fx
from demo.sentiment import fresh_model, read_reviews

RATES = [1e-4 * 10 ** (number / 4) for number in range(9)]  # 1e-4 to 1e-2
STEPS, SIZE, WIDTH, HEIGHT = 12, 4, 640, 240
RULES = {
    "version": 1,
    "rules": [
        {"match": {"name": "**.{query,value}"}, "lora": {"r": 8, "alpha": 16}},
        {"match": {"name": "classifier"}, "lora": {"r": 2, "alpha": 32}},
    ],
}


def picture(losses: list[list[float]]) -> str:
    """Return the losses as SVG: a curve for each rate, the higher the darker, each point the mean of five steps."""
    curves = [[sum(run[max(0, k - 4) : k + 1]) / min(5, k + 1) for k in range(len(run))] for run in losses]
    low, high = min(map(min, curves)), max(map(max, curves))
    drawn = []
    for number, curve in enumerate(curves):
        at = [(WIDTH * k / (STEPS - 1), HEIGHT * (high - value) / (high - low)) for k, value in enumerate(curve)]
        colour = f"hsl(160, 60%, {75 - 7 * number}%)"
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn.append(f'<text x="{WIDTH + 8}" y="{14 + 18 * number}" fill="{colour}">{RATES[number]:.1e}</text>')
    size = f'viewBox="-8 -8 {WIDTH + 96} {HEIGHT + 16}" font-family="system-ui" font-size="13"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *drawn, "</svg>\n"])


torch.manual_seed(0)
reviews, _ = read_reviews(STEPS * SIZE, 0)
batches = reviews.batches(SIZE)
names = [f"rate{number}" for number in range(len(RATES))]

tuned = lora_fx.apply(fresh_model(), RULES, batches[0][0])
lora_fx.rename(tuned, "default", names[0])
for name in names[1:]:
    lora_fx.add(tuned, RULES, adapter=name)
start = {key.replace(".rate0.", ".{}."): p.detach().clone() for key, p in tuned.named_parameters() if ".rate0." in key}
optimizers = []
for name, rate in zip(names, RATES, strict=True):
    factors = {key: p for key, p in tuned.named_parameters() if f".{name}." in key}
    with torch.no_grad():  # the same first values for all, so that the rate alone is compared
        for key, parameter in factors.items():
            parameter.copy_(start[key.replace(f".{name}.", ".{}.")])
    optimizers.append(torch.optim.AdamW(factors.values(), lr=rate))

losses: list[list[float]] = [[] for _ in RATES]
for inputs, labels in batches:
    with lora_fx.rows(tuned, [name for name in names for _ in range(SIZE)]):  # each adapter has the batch as its rows
        logits = tuned(**{key: value.repeat(len(RATES), 1) for key, value in inputs.items()}).logits
        each = [F.cross_entropy(part, labels) for part in logits.split(SIZE)]
        torch.stack(each).sum().backward()
    for optimizer, loss, run in zip(optimizers, each, losses, strict=True):
        optimizer.step()
        optimizer.zero_grad()
        run.append(loss.item())

for rate, run in zip(RATES, losses, strict=True):
    print(f"rate {rate:.1e}: loss {sum(run[:5]) / 5:.3f} → {sum(run[-5:]) / 5:.3f}")
file = Path(gettempdir()) / "nine_rates.svg"
file.write_text(picture(losses), encoding="utf-8")
print(file)
