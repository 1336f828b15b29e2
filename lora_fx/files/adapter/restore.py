"""AdapterFile + model → an adapted model; everything is checked against the model before anything is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import Attached, all_attached, attached_to
from lora_fx.errors import AdapterMismatchError, RefusedError
from lora_fx.files.adapter.codec import Form, decode, form_of, has_other_border, misfit
from lora_fx.files.adapter.header import slices_of
from lora_fx.files.adapter.read import AdapterFile, SavedSite
from lora_fx.files.fingerprint import different
from lora_fx.models.tensors import get_tensor
from lora_fx.planning.plan import Decisions
from lora_fx.planning.planned import Inventory, PlannedSite, TrainedModule
from lora_fx.planning.sites import Site

Mismatch = tuple[str, str, str]


def decisions_in(files: Sequence[AdapterFile], inventory: Inventory, model: nn.Module) -> Decisions:
    """Return the decisions that adapt exactly the sites of the files.

    Raises:
        AdapterMismatchError: sites or modules that the model has not or has in other shapes, or another base.
        RefusedError: a site that lora_fx cannot adapt.
    """
    sites = _by_name(inventory)
    problems = [problem for file in files for problem in _mismatches(file, sites, model)]
    if problems:
        raise AdapterMismatchError("the adapter does not fit this model", problems, _advice(problems))
    _refuse(files, sites, model)
    saved: dict[str, tuple[AdapterFile, SavedSite]] = {}
    for file in files:
        for each in file.sites:
            saved.setdefault(sites[each.path].path, (file, each))
    return Decisions(
        model=inventory.model,
        source=str(files[0].folder),
        sites=tuple(_planned(site, saved.get(site.path)) for site in inventory.sites),
        train=tuple(_trained(path, inventory, files[0]) for path in files[0].trained),
        total=inventory.total,
        fingerprint=inventory.fingerprint,
        rules=files[0].rules,
    )


def _mismatches(file: AdapterFile, sites: dict[str, Site], model: nn.Module) -> Iterator[Mismatch]:
    for each in file.sites:
        site = sites.get(each.path)
        given = tuple(each.lora_A.shape), tuple(each.lora_B.shape)
        if site is None:
            yield each.path, _factor_text(given), "has no such linear"
            continue
        yield from _other_factors(each, site, form_of(site, model.get_submodule(site.owner)))
        yield from _other_calls(each, site)
    yield from _module_mismatches(file, model)
    yield from _other_base(file, sites, model)


def _by_name(inventory: Inventory) -> dict[str, Site]:
    """Return the sites by each of their names; a path of its own goes before another site's alias."""
    named = {path: site for site in reversed(inventory.sites) for path in site.aliases}
    return named | {site.path: site for site in inventory.sites}


def _other_factors(each: SavedSite, site: Site, form: Form) -> Iterator[Mismatch]:
    """Yield how the factors of a file are not those that an adapter of the site has."""
    given = tuple(each.lora_A.shape), tuple(each.lora_B.shape)
    expected = form.shapes(each.lora.r if each.note is None else each.lora.r * each.note.file_ranks // form.groups)
    if given != expected or each.embedding != (site.op == "embedding" and not site.parameter):
        texts = _factor_text(given), _factor_text(expected)
        yield each.path, *(texts if texts[0] != texts[1] else (_size_text(given), _size_text(expected)))
        return
    try:
        parts = _parts(each, site)
    except ValueError as error:
        yield each.path, "its slices", str(error)
        return
    if each.note is not None and each.note.file_ranks != max(1, len(parts)) * form.groups:
        yield each.path, f"has {each.note.file_ranks} · r ranks", f"{len(parts)} parts, {form.groups} groups"
    elif (problem := misfit(form, parts, each.lora_A, each.lora_B)) is not None:
        yield each.path, "in the file", problem


def _parts(each: SavedSite, site: Site) -> tuple[tuple[int, ...], ...]:
    if each.note is None or each.note.slices is None:
        return ()
    return slices_of(each.note.slices).rows(site.features[0])


def _other_calls(each: SavedSite, site: Site) -> Iterator[Mismatch]:
    if each.note is not None and each.note.calls and site.calls not in (None, each.note.calls):
        yield each.path, f"an adapter for each of {each.note.calls} calls", f"called {site.calls} times"


def _factor_text(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    """Return `8 → 16` for linears, all sizes of both factors for the rest."""
    first, second = shapes
    return f"{first[1]} → {second[0]}" if len(first) == 2 and len(second) == 2 else _size_text(shapes)


def _size_text(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    return f"A {list(shapes[0])}, B {list(shapes[1])}"


def _module_mismatches(file: AdapterFile, model: nn.Module) -> Iterator[Mismatch]:
    state = model.state_dict(keep_vars=True)
    for name, tensor in file.modules.items():
        if name not in state:
            yield name, str(list(tensor.shape)), "has no such tensor"
        elif state[name].shape != tensor.shape:
            yield name, str(list(tensor.shape)), str(list(state[name].shape))
    modules = [path for path, _ in model.named_modules(remove_duplicate=False)]
    for path in file.trained:
        if path not in modules:
            yield path, "trained whole", "has no such module"
    inside = tuple(f"{path}." for path in (*file.trained, *(p for p in modules if p.endswith(file.claimed))))
    for name, tensor in state.items():
        if name.startswith(inside) and name not in file.modules:
            yield name, "missing", str(list(tensor.shape))


def _other_base(file: AdapterFile, sites: dict[str, Site], model: nn.Module) -> Iterator[Mismatch]:
    weights = {}
    for each in file.sites:
        site = sites.get(each.path)
        weight = None if site is None else get_tensor(model, site.weight)
        if weight is not None:
            weights[each.path] = weight
    for path in different(file.base, weights):
        yield sites[path].weight, "trained on other values", "is another base, or was changed since"


def _advice(problems: Sequence[Mismatch]) -> str:
    return f"{len(problems)} differences; give the model that the adapter was trained on"


def _refuse(files: Sequence[AdapterFile], sites: dict[str, Site], model: nn.Module) -> None:
    refused = [
        (each.path, reason)
        for file in files
        for each in file.sites
        if (reason := _refusal(each, sites[each.path], model)) is not None
    ]
    if refused:
        raise RefusedError("the adapter has sites that cannot be adapted", list(dict.fromkeys(refused)))


def _refusal(each: SavedSite, site: Site, model: nn.Module) -> str | None:
    if each.lora.dora and (site.op != "linear" or site.parameter):
        return "DoRA is for whole linear layers, not for this kind of site"
    if each.note is None and has_other_border(model.get_submodule(site.owner)):
        return (
            "PEFT trains it without the padding_mode and dilation of the convolution, so what was trained is no change "
            "of its weight"
        )
    return site.refusal


def _planned(site: Site, saved: tuple[AdapterFile, SavedSite] | None) -> PlannedSite:
    if saved is None:
        return PlannedSite(site, "keep", "not in the adapter")
    file, each = saved
    slices = None if each.note is None or each.note.slices is None else slices_of(each.note.slices)
    calls = 0 if each.note is None else each.note.calls
    if calls:
        site = replace(site, calls=calls)
    reason = f"from {file.folder.name}"
    return PlannedSite(site, "adapt", reason, each.rule or None, each.lora, slices, per_call=calls > 0)


def _trained(path: str, inventory: Inventory, file: AdapterFile) -> TrainedModule:
    return TrainedModule(path, dict(inventory.modules)[path], f"{file.folder.name}: modules_to_save")


def fill(tuned: nn.Module, files: Sequence[AdapterFile]) -> None:
    """Copy the saved values into a freshly adapted model, in place."""
    places = {(path, found.call): found for site, found in all_attached(tuned) for path in {site, found.spec.path}}
    with torch.no_grad():
        for file in files:
            for each in file.sites:
                call = None if each.note is None else each.note.call
                _fill_site(places.get((each.path, call)) or _under_another_name(tuned, each.path, call), each)
            for name, tensor in file.modules.items():
                _copy(get_tensor(tuned, name), tensor)


def _under_another_name(tuned: nn.Module, path: str, call: int | None) -> Attached:
    """Return the adapter of a shared module by another of its names, or of an attention by PEFT's."""
    return next(found for found in attached_to(tuned.get_submodule(path)) if found.call == call)


def _fill_site(found: Attached, each: SavedSite) -> None:
    decode(found, each.lora_A, each.lora_B)
    if each.magnitude is not None:
        assert found.magnitude is not None
        _copy(found.magnitude.weight, each.magnitude)
    if each.bias is not None:
        _copy(found.owner._parameters["bias"], each.bias)


def _copy(target: Tensor | None, value: Tensor) -> None:
    assert target is not None
    target.copy_(value)
