"""onnx: one graph of the base model, whose adapters are optional inputs; and a file for each adapter.

Every A and B is an initializer that is also an input: without an adapter its rank is 0, and the graph computes what the
base computes; onnxruntime fills in the values of the `.onnx_adapter` files that a run names.  The scaling is in B.
"""

import importlib
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError
from lora_fx.exporters import clients
from lora_fx.exporters.base_graph import NAME, BaseGraphParts, base_graph_parts
from lora_fx.exporters.program import (
    EVERY_FEATURE,
    EXPERTS,
    as_fact,
    converting,
    exported,
    input_tensors,
    output_names,
    plain_outputs_of_both,
    quiet,
    refused_by_programs,
)
from lora_fx.exporters.running import run_client, worst_difference
from lora_fx.exporters.target import Target, at_one_weight
from lora_fx.files.fingerprint import same_values
from lora_fx.models.samples import Sample
from lora_fx.models.ties import tied_names
from lora_fx.progress.steps import step
from lora_fx.tuned.several import only

ADAPTER_SUFFIX = ".onnx_adapter"
NOTE = "lora_fx"
"""Key of the model's metadata that says what its adapters may be."""
_LARGE = 1_800_000_000
"""Bytes above which the weights lie beside the graph: a protobuf file ends at 2 GiB."""
_ADAPTER_NAME = re.compile(rf"(?:(?<=\.)|^)(lora_A|lora_B|lora_magnitude_vector)\.{NAME}\.")


def _write(
    tuned: nn.Module, path: Path, sample: Sample, optimize: bool = True, graph: str | Path | None = None
) -> None:
    parts = base_graph_parts(tuned)
    if path.suffix == ADAPTER_SUFFIX:
        _write_adapter_for(parts, path, graph)
        return
    model = _converted(parts, sample)
    lifted = _lift(model, parts)
    if optimize:
        with step("optimising"), quiet():  # the adapters have no values at this time, so none is folded
            importlib.import_module("onnxscript.optimizer").optimize_ir(model)
    _give_defaults(model, lifted, parts)
    _save(model, path)
    for name, values in parts.adapters.items():
        _write_adapter(path.with_name(f"{name}{ADAPTER_SUFFIX}"), values)


def short(name: str) -> str:
    """Return the name of a parameter without the adapter's: `q_proj.lora_A.weight`."""
    return _ADAPTER_NAME.sub(r"\1.", name)


# -- the graph


def _converted(parts: BaseGraphParts, sample: Sample) -> Any:
    """Return the model as onnx_ir holds it, unoptimised: what optimises renames or folds the adapters' initializers."""
    program = exported("onnx", parts.model, sample)
    with step("converting"), converting("onnx", "torch.onnx cannot convert the model", EXPERTS):
        made = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
    assert made is not None
    model: Any = made.model
    _rename(model.graph.inputs, list(input_tensors(parts.model, sample)))
    _rename(model.graph.outputs, output_names(parts.model, sample))
    _forget_tracing(model)
    return model


def _rename(values: Any, names: list[str]) -> None:
    if len(values) == len(names) and len({id(value) for value in values}) == len(names):
        for value, name in zip(values, names, strict=True):
            value.name = name


def _forget_tracing(model: Any) -> None:
    """Drop where in somebody's files each node came from, and the shapes of what lies between: ranks may change."""
    ends = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in ends:
                value.shape = None


def _lift(model: Any, parts: BaseGraphParts) -> dict[str, Any]:
    """Make inputs of all that adapters change, in place; return them by the names of `parts.base`."""
    lifted, notes = {}, {}
    _refuse_shared_names(model, parts)
    aliases = {name: group for group in tied_names(parts.model) for name in group}
    for name, default in parts.base.items():
        value = _taken(model, aliases.get(name, [name]))
        if value is None:
            raise ExportError("onnx", "torch.onnx has left out a part of the adapter", [(name, "is in no node")])
        axis = parts.rank_axes.get(name)
        value.name, value.const_value = short(name), None
        value.shape = _shape(default, axis, value.name)
        model.graph.inputs.append(value)
        lifted[name] = value
        notes[value.name] = {"shape": list(default.shape), "rank": axis, "dtype": str(default.dtype)}
    model.metadata_props[NOTE] = json.dumps({"inputs": notes, "base": parts.fingerprint})
    return lifted


def _refuse_shared_names(model: Any, parts: BaseGraphParts) -> None:
    """A parameter called like an input would take its place: onnxruntime prefers the adapter's value to a fed one."""
    inputs = {value.name for value in model.graph.inputs}
    shared = [(name, "is also called so") for name in parts.base if short(name) in inputs]
    if shared:
        raise ExportError("onnx", "an input of the model has the name of a parameter", shared, "rename the argument")


def _taken(model: Any, names: Sequence[str]) -> Any:
    """Take the initializers of these names out of the graph, in place, and return one that stands for them all."""
    ir = importlib.import_module("onnx_ir")
    initializers = [model.graph.initializers.pop(name) for name in names if name in model.graph.initializers]
    for other in initializers[1:]:
        ir.convenience.replace_all_uses_with(other, initializers[0])
    return initializers[0] if initializers else None


def _shape(default: Tensor, axis: int | None, name: str) -> Any:
    ir = importlib.import_module("onnx_ir")
    site = re.sub(r"\.?lora_[AB]\.weight$", "", name)
    return ir.Shape([f"rank of {site}" if place == axis else size for place, size in enumerate(default.shape)])


def _give_defaults(model: Any, lifted: dict[str, Any], parts: BaseGraphParts) -> None:
    """Let the inputs be optional, in place: without a value the graph is the base."""
    ir = importlib.import_module("onnx_ir")
    for name, value in lifted.items():
        default, axis = parts.base[name], parts.rank_axes.get(name)
        if axis is not None:
            default = default.narrow(axis, 0, 0)
        value.const_value = ir.tensor(_array(default), name=value.name)
        model.graph.register_initializer(value)


def _save(model: Any, path: Path) -> None:
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    beside = f"{path.name}.data" if size > _LARGE else None
    importlib.import_module("onnx_ir").save(model, path, external_data=beside)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()


# -- adapters


def _write_adapter(path: Path, values: dict[str, Tensor]) -> None:
    runtime = importlib.import_module("onnxruntime")
    arrays = {short(name): _array(value) for name, value in values.items()}
    file = runtime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({name: runtime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    file.export_adapter(str(path))


def _write_adapter_for(parts: BaseGraphParts, path: Path, graph: str | Path | None) -> None:
    """Write an adapter for a graph that another one was exported with, if it fits."""
    if graph is None or len(parts.adapters) > 1:
        what = "a graph to go with" if graph is None else "one adapter, not several"
        raise ExportError("onnx", f"an {ADAPTER_SUFFIX} file needs {what}", advice="graph='model.onnx'")
    values = next(iter(parts.adapters.values()))
    note = _note_of(Path(graph))
    problems = [(short(name), why) for name, value in values.items() if (why := _misfit(note, short(name), value))]
    problems += [
        (site, "has another base weight there")
        for site, sample in parts.fingerprint.items()
        if not same_values(note["base"].get(site), sample)
    ]
    if problems:
        raise ExportError(
            "onnx", f"{graph} is not a graph for this adapter", problems, "export the graph from this adapter"
        )
    _write_adapter(path, values)


def _note_of(graph: Path) -> dict[str, Any]:
    ir = importlib.import_module("onnx_ir")
    try:
        note: dict[str, Any] = json.loads(ir.load(graph).metadata_props[NOTE])
    except (KeyError, OSError) as error:
        raise ExportError("onnx", f"{graph} is not a graph that lora_fx has exported", [as_fact(error)]) from error
    return note


def _misfit(note: dict[str, Any], name: str, value: Tensor) -> str | None:
    slot = note["inputs"].get(name)
    if slot is None:
        return "the graph has no such input"
    if slot.get("dtype", str(value.dtype)) != str(value.dtype):
        return f"is {value.dtype}, in the graph {slot['dtype']}".replace("torch.", "")
    expected, shape = list(slot["shape"]), list(value.shape)
    if slot["rank"] is not None:
        expected[slot["rank"]] = shape[slot["rank"]]
    return None if expected == shape else f"is {shape}, in the graph {slot['shape']}"


# -- in onnxruntime


def _verify(tuned: nn.Module, path: Path, sample: Sample, graph: str | Path | None = None) -> float:
    alone = path.suffix == ADAPTER_SUFFIX
    files = [path] if alone else sorted(path.parent.glob(f"*{ADAPTER_SUFFIX}"))
    main = Path(graph) if alone and graph is not None else path
    if at_one_weight(tuned):
        return max(_difference(only(tuned, file.stem), main, [file], sample) for file in files)
    return _difference(tuned, main, files, sample)


def _difference(tuned: nn.Module, main: Path, files: list[Path], sample: Sample) -> float:
    client = partial(clients.onnx, main, files, input_tensors(tuned, sample))
    return worst_difference("onnx", plain_outputs_of_both(tuned, sample), run_client("onnx", client))


TARGET = Target(
    name="onnx",
    writes=f"`model.onnx`, the graph of the base, and an `{ADAPTER_SUFFIX}` file for each adapter beside it",
    client="onnxruntime",
    refused=refused_by_programs,
    write=_write,
    verify=_verify,
    several="each",
    extra="onnx",
    needs=("onnx", "onnxscript", "onnxruntime"),
    needs_sample=True,
    expresses=EVERY_FEATURE,
    options={
        "optimize": "fold constants and fuse nodes (True); adapters stay what they are",
        "graph": f"for a path that ends in {ADAPTER_SUFFIX}: the graph that the adapter is for",
    },
    verify_options=("graph",),
)
