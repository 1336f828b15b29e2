"""Runs a base model in llama.cpp with an adapter at scale 0 and at scale 1."""

from __future__ import annotations

from typing import Any

import xllamacpp  # type: ignore[import-untyped]


def work(given: dict[str, Any]) -> list[list[dict[int, float]]]:
    """Return the log-probabilities of the next words of each prompt, with the adapter at scale 0 and at scale 1."""
    server = xllamacpp.Server(_parameters(given["base"], given["adapter"]))
    return [[_next_words(server, prompt, given["words"], scale) for prompt in given["prompts"]] for scale in (0.0, 1.0)]


def _parameters(base: str, adapter: str) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = base
    parameters.n_ctx, parameters.n_predict, parameters.n_parallel = 512, 1, 1
    parameters.n_gpu_layers, parameters.warmup, parameters.fit_params = 0, False, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # half precision by default
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = adapter, 1.0
    parameters.lora_adapters = [lora]
    return parameters


def _next_words(server: Any, prompt: list[int], words: int, scale: float) -> dict[int, float]:
    """Return the logarithm of the probability of each of the likeliest next words."""
    asked = {
        "prompt": prompt,
        "n_predict": 1,
        "n_probs": words,
        "temperature": 0.0,
        "cache_prompt": False,
        "lora": [{"id": 0, "scale": scale}],
    }
    answer = server.handle_completions(asked)
    if "choices" not in answer:
        raise RuntimeError(f"llama.cpp gives no probabilities: {str(answer)[:300]}")
    likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {word["id"]: word["logprob"] for word in likeliest}
