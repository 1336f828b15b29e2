"""Loads merged weights: by from_pretrained, or into a plain model, where nothing may be missing or left over."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_fx.exporters.clients.job import outputs


def work(given: dict[str, Any]) -> list[Tensor]:
    """Return the outputs of the loaded model."""
    if "kind" in given:
        model, info = given["kind"].from_pretrained(given["path"], output_loading_info=True)
        wrong = {what: list(names) for what, names in info.items() if names}
        if wrong:
            raise ValueError(f"from_pretrained finds {wrong}")
    else:
        from safetensors.torch import load_file

        model = given["model"]
        model.load_state_dict(load_file(given["path"]), strict=True)
    return outputs(model.eval(), given["sample"])
