"""gguf_q4_0: a whole model for llama.cpp, the adapter folded into Q4_0 blocks whose codes are chosen by data.

Settings, tokenizer and all that is not adapted are those of a GGUF file of the base, byte by byte.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import Attached, all_attached
from lora_fx.errors import ExportError, MergeError
from lora_fx.exporters import clients
from lora_fx.exporters.gguf import (
    LAYOUTS,
    MOST_WORDS,
    GgufLayout,
    as_stored,
    config_of,
    difference,
    log_probabilities,
    prompts_in,
    tied_paths,
    write_tensors,
)
from lora_fx.exporters.running import run_client
from lora_fx.exporters.target import Refusal, Target, expressed, refusals
from lora_fx.models.packed import dequantised_, held_weight
from lora_fx.models.quantised import dense
from lora_fx.models.samples import Sample
from lora_fx.models.swap import original_class
from lora_fx.passes.merge import check_mergeable
from lora_fx.tuned.ongrid import merged_on_grid
from lora_fx.tuned.undo import merged

_NAME = "gguf_q4_0"
_ELSE = "merge the adapter (target 'merged'), convert that model and quantise it"
_REFUSED = {
    "train": f"the base's file has what was trained whole as it was; {_ELSE}",
    "tokens": f"the base's file has these rows as they were; {_ELSE}",
    "bias": f"the base's file has biases as they were; {_ELSE}",
}
_ANOTHER = 0.25
"""‖W' - W‖ / ‖W‖ from which a file's weight is of another base; 4 bits are about 0.1 off, 2 bits 0.2."""


def _refused(tuned: nn.Module) -> Iterator[Refusal]:
    name = original_class(tuned).__name__
    layout = LAYOUTS.get(name)
    if layout is None:
        yield "", f"the layout of {name} in GGUF has not been tested, only that of {', '.join(LAYOUTS)}"
        return
    try:
        check_mergeable(tuned)
    except MergeError as error:
        yield from ((path, reason) for path, reason in error.problems)
    tied = tied_paths(tuned)
    for path, adapter in all_attached(tuned):
        if (reason := _reason(path, adapter, layout, path in tied)) is not None:
            yield path, f"{reason}; {_ELSE}"
    yield from refusals(tuned, _REFUSED)


def _reason(path: str, adapter: Attached, layout: GgufLayout, tied: bool) -> str | None:
    """Return why a site's weight cannot be written, or None."""
    if not isinstance(adapter.owner, nn.Linear) or not adapter.spec.path_is_owner or layout.tensor(path) is None:
        return "codes are chosen for linear layers that the file is known to hold"
    if tied:
        return "its weight is tied, and a GGUF file holds a tied weight once: the other use would be adapted too"
    if adapter.base_weight.shape[1] % 32:
        return f"rows of {adapter.base_weight.shape[1]}: Q4_0 takes multiples of 32"
    return None


def _write(
    tuned: nn.Module, path: Path, base: str | Path | None = None, data: Iterable[object] | str | None = None
) -> None:
    if base is None or data is None or isinstance(data, str):
        advice = "lora_fx.export(tuned, 'model.gguf', 'gguf_q4_0', base='base.gguf', data=[batch, batch])"
        raise ExportError(_NAME, "needs the base model as a GGUF file, and batches of inputs", advice=advice)
    layout = LAYOUTS[original_class(tuned).__name__]
    reader = _opened(Path(base), layout)
    _check_base(tuned, layout, reader, Path(base))
    model, found = merged_on_grid(tuned, data, grid="q4_0")
    blocks = {}
    for one in found:
        name, weight = layout.tensor(one.path), model.get_submodule(one.path).get_parameter("weight")
        assert name is not None
        blocks[name] = _blocks(one.path, as_stored(weight, name, layout, config_of(tuned)))
    _copy(reader, path, blocks)


def _opened(base: Path, layout: GgufLayout) -> Any:
    try:
        reader = importlib.import_module("gguf").GGUFReader(base)
        architecture = reader.fields["general.architecture"].contents()
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ExportError(_NAME, f"{base} cannot be read as GGUF", [(type(error).__name__, str(error))]) from error
    if architecture != layout.architecture:
        raise ExportError(_NAME, f"{base} is a '{architecture}', the model a '{layout.architecture}'")
    if reader.byte_order == "S" or "split.count" in reader.fields:
        advice = "give one file, of this machine's byte order (llama-gguf-split --merge)"
        raise ExportError(_NAME, f"{base} is a part of a model, or of another machine", advice=advice)
    return reader


def _check_base(tuned: nn.Module, layout: GgufLayout, reader: Any, base: Path) -> None:
    """Refuse a file of another model: each weight of a known place is compared, as near as the file's type allows."""
    sites, tensors = {path for path, _ in all_attached(tuned)}, {tensor.name: tensor for tensor in reader.tensors}
    wrong = []
    for path, module in tuned.named_modules():
        name = layout.tensor(path) if isinstance(module, (nn.Linear, nn.Embedding)) else None
        if name is not None and name in tensors:
            ours = as_stored(
                dense(held_weight(module, "weight")).detach().float().cpu(), name, layout, config_of(tuned)
            )
            wrong += [(path, f"{name} {problem}") for problem in _differences(ours, tensors[name])]
        elif path in sites:
            wrong.append((path, f"{name} is not in the file"))
    if wrong:
        raise ExportError(_NAME, f"{base} is not of the model's base; nothing was written", wrong)


def _differences(ours: Tensor, tensor: Any) -> Iterator[str]:
    """Yield in what a tensor of a file is not this weight."""
    try:
        theirs = _stored(tensor)
    except NotImplementedError:
        yield f"is {tensor.tensor_type.name}, which the gguf package cannot read"
        return
    if theirs.shape != ours.shape:
        yield f"is {list(theirs.shape)} there, {list(ours.shape)} here"
    elif not (away := float((theirs - ours).norm() / ours.norm().clamp(min=1e-30))) < _ANOTHER:
        yield f"has other values: ‖Δ‖/‖W‖ {away:.2g}"


def _stored(tensor: Any) -> Tensor:
    """Return the numbers of a file's tensor as they lie there, float32."""
    return torch.from_numpy(
        importlib.import_module("gguf").dequantize(tensor.data, tensor.tensor_type).astype("float32")
    )


def _blocks(path: str, weight: Tensor) -> Any:
    """Return the bytes of a weight [out, in] that lies on the grid, 18 for each 32 values.

    Raises:
        ExportError: they stand for other values.
    """
    gguf = importlib.import_module("gguf")
    kind = gguf.GGMLQuantizationType.Q4_0
    made = gguf.quantize(weight.detach().float().cpu().contiguous().numpy(), kind)
    if not torch.equal(torch.from_numpy(gguf.dequantize(made, kind)).to(weight.dtype), weight.detach().cpu()):
        raise ExportError(_NAME, "GGUF's quantiser gives other codes than were chosen", [(path, "is not exact")])
    return made


def _copy(reader: Any, path: Path, blocks: dict[str, Any]) -> None:
    """Write a file like another one, some of its tensors as Q4_0 blocks."""
    gguf = importlib.import_module("gguf")
    keys = gguf.Keys.General
    writer = gguf.GGUFWriter(path, reader.fields[keys.ARCHITECTURE].contents(), endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    for field in reader.fields.values():
        if field.name in (keys.ARCHITECTURE, keys.FILE_TYPE) or field.name.startswith("GGUF."):
            continue
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        inner = gguf.GGUFValueType(int(field.parts[3][0])) if is_array else None  # `types` lacks it where it is empty
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    if keys.QUANTIZATION_VERSION not in reader.fields:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in reader.tensors:
        held = blocks.get(tensor.name)
        kind = tensor.tensor_type if held is None else gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(tensor.name, tensor.data if held is None else held, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    write_tensors(writer)


# -- in llama.cpp


def _verify(tuned: nn.Module, path: Path, sample: Sample) -> float:
    """Return max |Δ| of the logarithms of probabilities: llama.cpp's, and a model's that holds the file's weights.

    The model rounds what layers multiply by as llama.cpp does there; its weights are compared with the merged ones.
    """
    layout = LAYOUTS[original_class(tuned).__name__]
    prompts, words = prompts_in(tuned, sample), min(config_of(tuned).vocab_size, MOST_WORDS)
    model = dequantised_(merged(tuned, stays_plain=False)).eval()
    _take_weights_(model, layout, _opened(path, layout), {path for path, _ in all_attached(tuned)})
    (theirs,) = run_client(_NAME, partial(clients.gguf, path, None, prompts, words))
    return difference(log_probabilities(model, prompts), theirs)


def _take_weights_(model: nn.Module, layout: GgufLayout, reader: Any, sites: set[str]) -> None:
    """Give a merged model the weights of a file, and what llama.cpp rounds where it multiplies by them, in place.

    Raises:
        ExportError: an adapted weight is not there, or another one; llama.cpp's way with a type is not known here.
    """
    tensors, wrong = {tensor.name: tensor for tensor in reader.tensors}, []
    for path, module in model.named_modules():
        name = layout.tensor(path) if isinstance(module, (nn.Linear, nn.Embedding)) else None
        if path == "lm_head" and name not in tensors and config_of(model).tie_word_embeddings:
            name = layout.tensor("model.embed_tokens")
        if name is None or name not in tensors:
            continue
        tensor, exact = tensors[name], module.weight.detach().float()
        if problems := [*_differences(as_stored(exact.cpu(), name, layout, config_of(model)), tensor)]:
            wrong += [(path, f"{name} {problem}") for problem in problems]
        elif path in sites and tensor.tensor_type.name != "Q4_0":
            wrong.append((path, f"{name} is {tensor.tensor_type.name}, not Q4_0"))
        elif isinstance(module, nn.Linear) and tensor.tensor_type.name not in _ROUNDS:
            wrong.append((path, f"{name} is {tensor.tensor_type.name}: give a base of {', '.join(_ROUNDS)}"))
        else:
            module.weight = nn.Parameter(_values(tensor, name, layout, model).to(module.weight), requires_grad=False)
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(partial(_round_inputs, how=_ROUNDS[tensor.tensor_type.name]))
    if wrong:
        raise ExportError(_NAME, "cannot be compared with llama.cpp; nothing was written", wrong)


def _values(tensor: Any, name: str, layout: GgufLayout, model: nn.Module) -> Tensor:
    """Return the numbers of a file's tensor, with the rows in the model's order."""
    stored = _stored(tensor)
    order = as_stored(torch.arange(len(stored)), name, layout, config_of(model))
    values = torch.empty_like(stored)
    values[order] = stored
    return values


def _round_inputs(_: nn.Module, given: tuple[Tensor, ...], how: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    return (how(given[0].float()).to(given[0].dtype), *given[1:])


def _in_bytes(x: Tensor) -> Tensor:
    """Return what GGUF's Q8_0 holds of values [..., n]: of 32 one scale in float16, and a byte each."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks * torch.where(scale > 0, 1 / scale, 0)).round()
    return (codes * scale.half().float()).view(x.shape)


_ROUNDS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _in_bytes,
    "Q8_0": _in_bytes,
    "F16": lambda x: x.half().float(),
    "F32": lambda x: x,
}
"""What llama.cpp makes of what it multiplies by a weight of each type."""

TARGET = Target(
    name=_NAME,
    writes="one file, the merged model for `llama-cli -m`: adapted weights in Q4_0, all else as in the base's file",
    client="llama.cpp",
    refused=_refused,
    write=_write,
    verify=_verify,
    extra="gguf",
    needs=("gguf",),
    verify_needs=("xllamacpp",),
    expresses=expressed(
        {"conv1d", "convolution", "embedding", "attention", "parameter", "experts", "calls", "invocation", *_REFUSED}
    ),
    options={
        "base": "the base model as a GGUF file, of any type",
        "data": "two batches of inputs or more, by which codes are chosen, as for `merged_on_grid`; `--data`",
    },
    several="in use",
    tolerance=2e-2,
)
