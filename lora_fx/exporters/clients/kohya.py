"""Loads a file of kohya's format: LyCORIS by the names of the modules, diffusers by its converter."""

from __future__ import annotations

from typing import Any

from lora_fx.exporters.clients import diffusers
from lora_fx.exporters.clients.job import outputs


def work(given: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs with the adapter on and off."""
    return diffusers.work({**given, "component": "unet"}) if given["reader"] == "diffusers" else _in_lycoris(given)


def _in_lycoris(given: dict[str, Any]) -> dict[str, Any]:
    from lycoris.kohya import create_network_from_weights
    from safetensors.torch import load_file

    model = given["base"]
    base = outputs(model, given["sample"])
    tensors = load_file(given["file"])
    network, _ = create_network_from_weights(1.0, given["file"], None, None, model, tensors)
    names = {key.split(".")[0] for key in tensors}
    if {layer.lora_name for layer in network.unet_loras} != names:
        raise ValueError(f"LyCORIS reads {len(network.unet_loras)} of {len(names)} layers")
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    network.load_state_dict(tensors, strict=False)
    network.eval()
    return {"adapted": outputs(model, given["sample"]), "base": base}
