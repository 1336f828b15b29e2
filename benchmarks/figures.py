"""Print the figures that the documentation and the changelog give: `make figures`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import lora_fx

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.textbook import gpt2_classifier, gpt3

RULE = (
    '  - name: r{0}\n    match: {{name: "**.layers.{0}.{{q,v}}_proj", shape: [">=1024", "*"]}}\n    lora: {{r: 16}}\n'
)


def lint_seconds(rules: int) -> float:
    """Return the median time of `lora-fx lint`, the whole process, on a file of that many rules."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rules.yaml"
        path.write_text("version: 1\nrules:\n" + "".join(RULE.format(index) for index in range(rules)))
        times = []
        for _ in range(7):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "lora_fx", "lint", str(path)], check=True, capture_output=True)
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def plan_gpt3(example_inputs: object) -> tuple[float, lora_fx.Plan]:
    """Return the time to plan GPT-3 175B (96 layers) on the meta device, and the plan."""
    with torch.device("meta"):
        model = gpt3()
    rules = {"version": 1, "rules": [{"match": {"name": "**.W_{query,value}"}, "lora": {"r": 8}}]}
    started = time.perf_counter()
    plan = lora_fx.plan(model, rules, example_inputs)
    return time.perf_counter() - started, plan


def main() -> None:
    print(f"lora-fx lint, 1,000 rules, whole process: {lint_seconds(1000):.2f} s (median of 7)")
    for what, inputs in (("without inputs", None), ("with inputs", (torch.zeros(2, 16, dtype=torch.long),))):
        seconds, plan = plan_gpt3(inputs)
        graphs = sum(site.backend == "graph" for site in plan.adapted)
        summary = f"{plan.trainable:,} trainable, {graphs} sites in graphs"
        print(f"plan of GPT-3 175B on meta, {what}: {seconds:.1f} s, {summary}")
    with torch.device("meta"):
        classifier = gpt2_classifier()
    rules = {"version": 1, "rules": [{"match": {"name": "**"}, "lora": {"r": 16, "alpha": 16}}]}
    print(f"GPT-2 124M, separate q/k/v, 2 classes, all linears, r=16: {lora_fx.plan(classifier, rules).trainable:,}")


if __name__ == "__main__":
    main()
