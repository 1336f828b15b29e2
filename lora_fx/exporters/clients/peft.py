"""Loads an adapter in PEFT; what it misses or finds unexpected in the file is an error here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lora_fx.exporters.clients.job import outputs


def work(given: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs with the adapters on and off."""
    import peft

    folder = Path(given["folder"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("error", message="Unexpected keyword arguments")
        model: Any = peft.PeftModel.from_pretrained(given["base"], folder)
        for name in given["others"]:
            model.load_adapter(folder / name, name)
    model.base_model.set_adapter(["default", *given["others"]])
    model.eval()
    adapted = outputs(model, given["sample"])
    with model.disable_adapter():
        return {"adapted": adapted, "base": outputs(model, given["sample"])}
