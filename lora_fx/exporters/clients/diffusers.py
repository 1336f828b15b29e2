"""Loads an adapter as pipelines of diffusers do: file, metadata, then the model's own load_lora_adapter."""

from __future__ import annotations

from typing import Any

from lora_fx.exporters.clients.job import outputs


def work(given: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs with the adapter on and off."""
    import diffusers

    model, component = given["base"], given["component"]
    pipeline: Any = diffusers.StableDiffusionPipeline
    tensors, alphas, metadata = pipeline.lora_state_dict(given["file"], return_lora_metadata=True)
    model.load_lora_adapter(tensors, prefix=component, network_alphas=alphas, metadata=metadata)
    adapted = outputs(model, given["sample"])
    model.disable_lora()
    return {"adapted": adapted, "base": outputs(model, given["sample"])}
