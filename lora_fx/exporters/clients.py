"""The clients: each function loads what was written in the program that it is for, and returns its outputs.

They run in a process of their own (`running.run_client`).  Each imports its program itself, and nothing else of
lora_fx, so that the real client stands alone with what was written.
"""

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of the model."""
Both = tuple[list[Tensor], list[Tensor]]
"""Outputs without the adapters, and with them."""


def outputs(model: Callable[..., Any], call: Call) -> list[Tensor]:
    """Return the floating point tensors that a call of the model gives, in order."""
    args, kwargs = call
    with torch.no_grad():
        return list(tensors(model(*args, **kwargs)))


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating point tensors in an output: in tuples, lists, dicts and objects with attributes."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.detach().float().cpu()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, type):
        for item in vars(value).values():
            yield from tensors(item)


# -- adapters beside a base


def peft(base: nn.Module, folder: Path, others: list[str], call: Call) -> Both:
    """Return what PEFT computes with adapters; what it misses or finds unexpected in the file is an error here."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("error", message="Unexpected keyword arguments")
        model: Any = peft.PeftModel.from_pretrained(base, folder)
        for name in others:
            model.load_adapter(folder / name, name)
    model.base_model.set_adapter(["default", *others])
    model.eval()
    adapted = outputs(model, call)
    with model.disable_adapter():
        return outputs(model, call), adapted


def diffusers(base: nn.Module, file: Path, component: str, call: Call) -> Both:
    """Return what diffusers computes, loading as its pipelines do: metadata, then the model's own load_lora_adapter."""
    import diffusers

    model: Any = base
    pipeline: Any = diffusers.StableDiffusionXLPipeline
    tensors, alphas, metadata = pipeline.lora_state_dict(str(file), return_lora_metadata=True)
    if component.startswith("text_encoder"):
        pipeline.load_lora_into_text_encoder(tensors, alphas, model, prefix=component, metadata=metadata)
    else:
        model.load_lora_adapter(tensors, prefix=component, network_alphas=alphas, metadata=metadata)
    adapted = outputs(model, call)
    switch_off = model.disable_adapters if component.startswith("text_encoder") else model.disable_lora
    switch_off()
    return outputs(model, call), adapted


def lycoris(base: nn.Module, file: Path, call: Call) -> Both:
    """Return what LyCORIS computes with a file of kohya's format, read by the names of the modules."""
    from lycoris.kohya import create_network_from_weights
    from safetensors.torch import load_file

    before = outputs(base, call)
    tensors = load_file(file)
    network, _ = create_network_from_weights(1.0, str(file), None, None, base, tensors)
    names = {key.split(".")[0] for key in tensors}
    if {layer.lora_name for layer in network.unet_loras} != names:
        raise ValueError(f"LyCORIS reads {len(network.unet_loras)} of {len(names)} layers")
    network.apply_to(None, base, apply_text_encoder=False, apply_unet=True)
    network.load_state_dict(tensors, strict=False)
    network.eval()
    return before, outputs(base, call)


def mlx(base: Path, adapter: Path, ids: Tensor) -> Both:
    """Return the logits of a model of transformers and an adapter in mlx-lm, on the CPU.

    mlx-lm says nothing of factors that the file lacks; here they are an error.
    """
    import mlx.core as mx
    import numpy
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(base)
    given = mx.array(ids.numpy())

    def logits() -> list[Tensor]:
        return [torch.from_numpy(numpy.array(model(given).astype(mx.float32)))]

    before = logits()
    load_adapters(model, str(adapter))
    loaded: Any = mx.load(str(adapter / "adapters.safetensors"))
    now: dict[str, Any] = dict(tree_flatten(model.parameters()))
    missing = [name for name in now if name.endswith((".lora_a", ".lora_b", ".m")) and name not in loaded]
    if missing:
        raise ValueError(f"the file lacks {missing}")
    model.eval()
    return before, logits()


def gguf(base: Path, adapter: Path | None, prompts: list[list[int]], words: int) -> list[list[dict[int, float]]]:
    """Run a model in llama.cpp: with an adapter at scale 0 and at scale 1, or once without one.

    Returns, for each run and each prompt, the logarithms of the probabilities of the likeliest next words.
    """
    import xllamacpp  # type: ignore[import-untyped]

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(base)
    parameters.n_ctx, parameters.n_predict, parameters.n_parallel = 512, 1, 1
    parameters.n_gpu_layers, parameters.warmup, parameters.fit_params = 0, False, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # half precision by default
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    chosen: list[dict[str, Any]] = [{}]
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        parameters.lora_adapters = [lora]
        chosen = [{"lora": [{"id": 0, "scale": scale}]} for scale in (0.0, 1.0)]
    server = xllamacpp.Server(parameters)
    return [[_next_words(server, prompt, words, choice) for prompt in prompts] for choice in chosen]


def _next_words(server: Any, prompt: list[int], words: int, choice: dict[str, Any]) -> dict[int, float]:
    asked = {
        "prompt": prompt,
        "n_predict": 1,
        "n_probs": words,
        "temperature": 0.0,
        "cache_prompt": False,
        **choice,
    }
    answer = server.handle_completions(asked)
    if "choices" not in answer:
        raise RuntimeError(f"llama.cpp gives no probabilities: {str(answer)[:300]}")
    likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {word["id"]: word["logprob"] for word in likeliest}


# -- whole models and programs


def from_pretrained(kind: Any, path: Path, call: Call) -> list[Tensor]:
    """Return outputs of merged weights, loaded by from_pretrained; what it misses or cannot place is an error."""
    model, info = kind.from_pretrained(path, output_loading_info=True)
    wrong = {what: list(names) for what, names in info.items() if names}
    if wrong:
        raise ValueError(f"from_pretrained finds {wrong}")
    return outputs(model.eval(), call)


def plain(model: nn.Module, file: Path, call: Call) -> list[Tensor]:
    """Return outputs of merged weights in a plain model, where nothing may be missing or left over."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(file), strict=True)
    return outputs(model.eval(), call)


def onnx(graph: Path, adapters: list[Path], inputs: dict[str, Tensor]) -> Both:
    """Return outputs of a graph in onnxruntime without adapters, and with all of its adapter files."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # a warning for each initializer that is an input, which is what we want
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    loaded = []
    for path in adapters:
        loaded.append(onnxruntime.LoraAdapter())
        loaded[-1].Load(str(path))

    def run(active: list[Any]) -> list[Tensor]:
        chosen = onnxruntime.RunOptions()
        for adapter in active:
            chosen.add_active_adapter(adapter)
        return list(tensors([torch.from_numpy(array) for array in session.run(None, feeds, chosen)]))

    return run([]), run(loaded)


def executorch(program: Path, inputs: list[Tensor]) -> Both:
    """Return outputs of both methods of a program in ExecuTorch's portable runtime."""
    from executorch.runtime import Runtime  # type: ignore[import-untyped]

    loaded = Runtime.get().load_program(str(program))

    def run(method: str) -> list[Tensor]:
        # what comes back lies in the program's own memory, which the next call uses again
        return [tensor.clone() for tensor in tensors(loaded.load_method(method).execute(inputs))]

    adapted = run("forward")
    return run("base"), adapted


def pt2(programs: list[Path], base: Path, adapters: list[Path], call: Call) -> list[Both]:
    """Return outputs of programs, saved by torch.export or compiled, with the base's values, then all adapters'."""
    from safetensors.torch import load_file

    values = {name: value for path in adapters for name, value in load_file(path).items()}
    results = []
    for path in programs:
        run, put = _compiled(path) if path.name.endswith(".aoti.pt2") else _exported(path)
        put(load_file(base))
        before = outputs(run, call)
        put(values)
        results.append((before, outputs(run, call)))
    return results


Put = Callable[[dict[str, Tensor]], object]


def _exported(path: Path) -> tuple[Callable[..., Any], Put]:
    module = torch.export.load(path).module()
    return module, lambda values: module.load_state_dict(values, strict=False)


def _compiled(path: Path) -> tuple[Callable[..., Any], Put]:
    # torch documents this as the way to load what AOTInductor has compiled; a client imports nothing else of lora_fx
    package: Any = importlib.import_module("torch._inductor").aoti_load_package(str(path))
    known = set(package.get_constant_fqns())

    def put(values: dict[str, Tensor]) -> None:
        missing = sorted(set(values) - known)
        if missing:
            raise KeyError(f"the compiled program has no {missing}")
        package.load_constants(values, check_full_update=False)

    return package, put
