"""pt2: the program that torch.export makes of the adapted model, whose adapters are named parameters; and their values.

Another adapter is put in with `program.module().load_state_dict(values, strict=False)`, or, in a program that
AOTInductor has compiled, with `load_constants(values, check_full_update=False)`.  The scaling is in B.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from lora_fx.errors import ExportError
from lora_fx.exporters import clients
from lora_fx.exporters.base_graph import BaseGraphParts, base_graph_parts
from lora_fx.exporters.program import (
    EVERY_FEATURE,
    call_of,
    converting,
    exported,
    plain_outputs_of_both,
    refused_by_programs,
)
from lora_fx.exporters.running import run_client, worst_difference
from lora_fx.exporters.target import Target
from lora_fx.graphdiff.programs import load_program
from lora_fx.models.code import refuse_odd_paths
from lora_fx.models.samples import Sample
from lora_fx.models.ties import tied_names
from lora_fx.models.torch_internals import aot_inductor
from lora_fx.progress.steps import step

VALUES = ".safetensors"
BASE, COMPILED = ".base.safetensors", ".aoti.pt2"
"""Ends of the names of what lies beside `model.pt2`: `model.base.safetensors`, `model.aoti.pt2`."""


_KEEP = {"always_keep_tensor_constants": True}
"""Inductor writes vectors of up to 8 values into its code otherwise: a bias of two classes could not be replaced."""


def _write(
    tuned: nn.Module,
    path: Path,
    sample: Sample,
    compile: bool = False,
    program: str | Path | None = None,
    trust: bool = False,
) -> None:
    parts = base_graph_parts(tuned)
    if path.suffix == VALUES:
        _write_values_for(parts, path, program, trust)
        return
    if path.suffix != ".pt2":
        raise ExportError("pt2", f"{path.name} does not end in .pt2, or in {VALUES} for an adapter alone")
    refuse_odd_paths(parts.model.state_dict())  # torch writes them into source when a client unpacks the program
    made = exported("pt2", parts.model, sample)
    _forget_sources(made)
    if compile:
        _compile(made, path.with_suffix(COMPILED))
    made.example_inputs = None  # they may be private; the compiler needs them
    with converting("pt2", "torch.export cannot save the program"):
        torch.export.save(made, path)
    kept = _kept_names(path, parts)
    _write_values(path.with_suffix(BASE), parts.base, kept)
    for name, values in parts.adapters.items():
        _write_values(path.with_name(f"{name}{VALUES}"), values, kept)


def _forget_sources(program: ExportedProgram) -> None:
    """Drop where in somebody's files each node came from, in place."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)


def _compile(program: ExportedProgram, path: Path) -> None:
    """Write the program as AOTInductor compiles it; needs a C++ compiler."""
    advice = "it needs a C++ compiler; leave out compile"
    with torch.no_grad(), step("compiling"), converting("pt2", "AOTInductor cannot compile the model", advice):
        aot_inductor().aoti_compile_and_package(program, package_path=str(path), inductor_configs=_KEEP)


def _kept_names(program: Path, parts: BaseGraphParts) -> dict[str, str]:
    """Return for each name of a tied weight the one that AOTInductor has kept; a program of torch.export takes any."""
    compiled = program.with_suffix(COMPILED)
    if not compiled.exists():
        return {}
    known = set(aot_inductor().aoti_load_package(str(compiled)).get_constant_fqns())
    return {name: kept for group in tied_names(parts.model) for kept in known.intersection(group) for name in group}


# -- adapters


def _write_values(path: Path, values: Mapping[str, Tensor], kept: Mapping[str, str]) -> None:
    named = {kept.get(name, name): value.detach().cpu().contiguous() for name, value in values.items()}
    save_file(dict(sorted(named.items())), path)


def _write_values_for(parts: BaseGraphParts, path: Path, program: str | Path | None, trust: bool) -> None:
    """Write an adapter for a program that another one was exported with, if it fits."""
    if program is None or len(parts.adapters) > 1:
        what = "a program to go with" if program is None else "one adapter, not several"
        raise ExportError("pt2", f"a {VALUES} file needs {what}", advice="program='model.pt2'")
    main = Path(program)
    state = load_program(main, trust).state_dict  # as its compiled form, which is native code, is trusted below
    values = next(iter(parts.adapters.values()))
    fitted = {name: _fitted(value, state.get(name), parts.rank_axes.get(name)) for name, value in values.items()}
    problems = [(name, _misfit(values[name], state.get(name))) for name, value in fitted.items() if value is None]
    if problems:
        raise ExportError(
            "pt2", f"{program} is not a program for this adapter", problems, "export the program from this adapter"
        )
    _write_values(path, {name: value for name, value in fitted.items() if value is not None}, _kept_names(main, parts))


def _fitted(value: Tensor, place: Tensor | None, axis: int | None) -> Tensor | None:
    """Return the values as the program has room for them, a lower rank with zeros; None if they do not fit."""
    if place is None or value.dim() != place.dim() or value.dtype != place.dtype:
        return None
    if axis is not None and value.shape[axis] < place.shape[axis]:
        room = list(value.shape)
        room[axis] = place.shape[axis] - value.shape[axis]
        value = torch.cat([value, value.new_zeros(room)], axis)
    return value if value.shape == place.shape else None


def _misfit(value: Tensor, place: Tensor | None) -> str:
    if place is None:
        return "the program has no such parameter"
    if value.dtype != place.dtype:  # AOTInductor would take the bytes for numbers of its own dtype
        return f"is {value.dtype}, in the program {place.dtype}".replace("torch.", "")
    return f"is {list(value.shape)}, in the program {list(place.shape)}"


# -- in a process of its own


def _verify(tuned: nn.Module, path: Path, sample: Sample, program: str | Path | None = None) -> float:
    alone = path.suffix == VALUES
    main = Path(program) if alone and program is not None else path
    base = main.with_suffix(BASE)
    adapters = [path] if alone else [file for file in sorted(path.parent.glob(f"*{VALUES}")) if file != base]
    programs = [file for file in (main, main.with_suffix(COMPILED)) if file.exists()]
    ours = plain_outputs_of_both(tuned, sample)
    results = run_client("pt2", partial(clients.pt2, programs, base, adapters, call_of(tuned, sample)))
    return max(worst_difference("pt2", ours, theirs) for theirs in results)


TARGET = Target(
    name="pt2",
    writes=f"`model.pt2`, a file of values for each adapter beside it, and `model{BASE}` to take them out again",
    client="torch.export and AOTInductor",
    refused=refused_by_programs,
    write=_write,
    verify=_verify,
    needs_sample=True,
    several="used",
    expresses=EVERY_FEATURE,
    options={
        "compile": f"also compile it with AOTInductor, to `model{COMPILED}` (False); needs a C++ compiler",
        "program": f"for a path that ends in {VALUES}: the program that the adapter is for, which is run: with trust",
        "trust": "that reading `program`, and its compiled form, may run any code that is in them (False)",
    },
    verify_options=("program",),
)
