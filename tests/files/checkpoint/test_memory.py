"""A merge takes no more memory than a few tiles, whatever is merged."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the highest RSS is read from /proc"),
]
ROWS, COLUMNS, RANK = 24_576, 4_096, 16
"""A weight of 201 MB in bfloat16."""
MEASURED = """
import json, sys
import torch
import lora_fx
torch.set_num_threads(4)
merge = lora_fx.merge_checkpoint
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the highest RSS counts from here
idle = status("VmRSS")
merge(*sys.argv[1:])
print(json.dumps({"above": (status("VmHWM") - idle) * 1024, "threads": torch.get_num_threads()}))
"""


def test_one_weight_of_200_megabytes_is_merged_in_64_megabytes_above_the_idle_process(tmp_path):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    for folder in (base, adapter):
        folder.mkdir()
    whole = {"up.weight": torch.ones(ROWS, COLUMNS, dtype=torch.bfloat16), "other": torch.zeros(1 << 22)}
    save_file(whole, base / "model.safetensors", {"format": "pt"})
    factors = {"lora_A": torch.full((RANK, COLUMNS), 0.5), "lora_B": torch.full((ROWS, RANK), 0.25)}
    named = {f"base_model.model.up.{name}.weight": tensor for name, tensor in factors.items()}
    save_file(named, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["up"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", MEASURED, *map(str, (base, adapter, out))]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert measured["above"] < 64 << 20
    assert (out / "model.safetensors").stat().st_size == (base / "model.safetensors").stat().st_size
    with (out / "model.safetensors").open("rb") as file:
        file.seek(-2, 2)
        last = torch.frombuffer(bytearray(file.read()), dtype=torch.bfloat16)
    assert last.item() in (5.0, 0.0)
