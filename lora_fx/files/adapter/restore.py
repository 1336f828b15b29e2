"""AdapterFile + model → an adapted model; everything is checked against the model before anything is made."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from lora_fx.adapters.attach import Attached, all_attached, attached_to
from lora_fx.adapters.starting import start_from_weight
from lora_fx.adapters.trained import added_tensors
from lora_fx.discovery.study import Observed, observed
from lora_fx.errors import AdapterFileError, AdapterMismatchError, RefusedError
from lora_fx.files.adapter import peftfiles
from lora_fx.files.adapter.biases import bias_mismatches, planned_biases
from lora_fx.files.adapter.codec import Form, decode, form_of, has_other_border, misfit
from lora_fx.files.adapter.names import begins_in
from lora_fx.files.adapter.noted import slices_of
from lora_fx.files.adapter.read import AdapterFile, read_adapters
from lora_fx.files.adapter.resolve import resolved, uses_in_files
from lora_fx.files.adapter.site import SavedSite
from lora_fx.files.adapter.tokens import fill_rows, misfitting_rows, planned_rows, row_mismatches
from lora_fx.files.fingerprint import SampledWeights, same_values, sample_values
from lora_fx.models.packed import is_packed
from lora_fx.models.samples import Samples
from lora_fx.models.shards import part_of, whole
from lora_fx.models.tensors import get_tensor, own_parameters
from lora_fx.models.wrappers import inside, module_at, without_wrappers
from lora_fx.planning.decisions import Decisions
from lora_fx.planning.planned import (
    IN_A_GRAPH,
    EmbeddingTable,
    Inventory,
    PlannedSite,
    TrainedModule,
    trained_whole,
    unfit_for_dora,
    unfit_for_init,
    unfit_for_invocation,
)
from lora_fx.planning.sites import Site
from lora_fx.progress.steps import step
from lora_fx.rules.inits import is_moved, pairs_of
from lora_fx.rules.ruleset import Slices

Mismatch = tuple[str, str, str]


def fitted(
    directory: str | os.PathLike[str], model: nn.Module, tried: Samples
) -> tuple[list[AdapterFile], Observed, Decisions]:
    """Return the files of a directory as the model names what is in them, the model as it was seen, and the decisions.

    Needs no values; the model stays unchanged.

    Raises:
        AdapterFileError: missing, damaged or contradictory files.
        AdapterMismatchError, RefusedError, CaptureError: as `decisions_in` and `observed`.
    """
    with step("reading"):
        read = read_adapters(directory)
    return fitted_files(read, model, tried)


def fitted_files(
    read: Sequence[AdapterFile], model: nn.Module, tried: Samples
) -> tuple[list[AdapterFile], Observed, Decisions]:
    """Return the same as `fitted` of adapters that have been read."""
    files = resolved(read, model)
    peftfiles.warn_of_missing(files[0], model)
    seen = observed(model, tried, uses_in_files(files, model))
    return files, seen, decisions_in(files, seen.inventory, model)


def decisions_in(files: Sequence[AdapterFile], inventory: Inventory, model: nn.Module) -> Decisions:
    """Return the decisions that adapt exactly the sites of the files.

    A weight that several files adapt has the adapter of the first; `in_turn` says which files that leaves out.

    Raises:
        AdapterMismatchError: sites or modules that the model does not have, or has in other shapes; another base.
        RefusedError: a site that lora_fx cannot adapt.
    """
    check(files, inventory, model)
    return decided(in_turn(files, inventory)[0], inventory)


def in_turn(files: Sequence[AdapterFile], inventory: Inventory) -> tuple[list[AdapterFile], list[AdapterFile]]:
    """Return the first file with those that share no weight with it or each other and train no module, and the rest."""
    sites, taken = _by_name(inventory), set[str]()
    together: list[AdapterFile] = []
    rest: list[AdapterFile] = []
    for file in files:
        own = {sites[saved.path].path for saved in file.sites}
        fits = taken.isdisjoint(own) and not (together and (file.header.trained or file.biases))
        (together if fits else rest).append(file)
        taken |= own if fits else set()
    return together, rest


def check(files: Sequence[AdapterFile], inventory: Inventory, model: nn.Module) -> None:
    """Raise what `decisions_in` raises of files that do not fit a model."""
    sites = _by_name(inventory)
    tables = inventory.tables
    problems = [bad for file in files for bad in (*_mismatches(file, sites, model, tables), *_twice(file, sites))]
    if problems:
        advice = f"{len(problems)} differences; give the model that the adapter was trained on"
        raise AdapterMismatchError("the adapter does not fit this model", problems, advice)
    names = [name_of(file) for file in files]
    if twice := [(name, "is the name of several") for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise AdapterFileError(str(files[0].folder), "has adapters of one name", twice)
    _refuse(files, sites, model)


def name_of(file: AdapterFile) -> str:
    """Return the name of the adapter in a file."""
    return file.sites[0].lora.adapter


def decided(files: Sequence[AdapterFile], inventory: Inventory) -> Decisions:
    """Return the decisions that adapt the sites of files which share none."""
    sites = _by_name(inventory)
    saved: dict[str, tuple[AdapterFile, SavedSite]] = {}
    for file in files:
        for saved_site in file.sites:
            saved.setdefault(sites[saved_site.path].path, (file, saved_site))
    modules = {without_wrappers(path): (path, number) for path, number in inventory.modules}
    pattern = f"{files[0].folder.name}: modules_to_save"
    trained = tuple(TrainedModule(*modules[path], pattern) for path in files[0].header.trained)
    names = {path: at_hand for path, (at_hand, _) in modules.items()}
    return Decisions(
        tokens=tuple(rows for file in files for rows in planned_rows(file, name_of(file), names)),
        biases=tuple(planned_biases(files[0], names)),
        model=inventory.model,
        source=str(files[0].folder),
        sites=tuple(_planned(site, saved.get(site.path), trained) for site in inventory.sites),
        train=trained,
        total=inventory.total,
        fingerprint=inventory.fingerprint,
        rules=files[0].header.rules,
    )


def _mismatches(
    file: AdapterFile, sites: dict[str, Site], model: nn.Module, tables: Sequence[EmbeddingTable]
) -> Iterator[Mismatch]:
    for saved in file.sites:
        site = sites.get(saved.path)
        given = tuple(saved.lora_A.shape), tuple(saved.lora_B.shape)
        if site is None:
            yield saved.path, _factor_text(given), "has no such linear"
            continue
        yield from _other_factors(saved, site, form_of(site, module_at(model, site.owner)))
        if saved.bias is not None and not site.bias:
            yield saved.path, "a bias", "none that belongs to the site"
        if saved.calls and site.calls not in (None, saved.calls):
            yield saved.path, f"an adapter for each of {saved.calls} calls", f"called {site.calls} times"
    yield from _module_mismatches(file, model)
    yield from bias_mismatches(file, model)
    yield from row_mismatches(file, model, tables)
    weights = {saved.path: sites[saved.path].weight for saved in file.sites if saved.path in sites}
    yield from misfitting_rows(file, weights)
    yield from _other_base(file, sites, model)


def _twice(file: AdapterFile, sites: dict[str, Site]) -> Iterator[Mismatch]:
    """Yield the sites for which a file has factors under two names."""
    stems: dict[object, list[str]] = {}
    for saved in file.sites:
        if saved.path in sites:
            stems.setdefault((sites[saved.path].path, saved.call), []).append(saved.stem)
    yield from ((names[0], f"also under {names[1]}", "is one weight") for names in stems.values() if len(names) > 1)


def _by_name(inventory: Inventory) -> dict[str, Site]:
    """Return the sites by each of their names; a path of its own goes before another site's alias."""
    named = {path: site for site in reversed(inventory.sites) for path in site.aliases}
    own = {site.path: site for site in inventory.sites}
    return {without_wrappers(path): site for path, site in own.items()} | named | own


def _other_factors(saved: SavedSite, site: Site, form: Form) -> Iterator[Mismatch]:
    """Yield how the factors of a file are not those that an adapter of the site has."""
    given = tuple(saved.lora_A.shape), tuple(saved.lora_B.shape)
    expected = form.shapes(saved.rank // form.groups if saved.noted else saved.lora.r)
    if given != expected or saved.embedding != (site.op == "embedding" and not site.parameter):
        texts = _factor_text(given), _factor_text(expected)
        yield saved.path, *(texts if texts[0] != texts[1] else (_size_text(given), _size_text(expected)))
        return
    try:
        slices = slices_in(saved)
        parts = () if slices is None else slices.rows(site.features[0])
    except ValueError as error:
        yield saved.path, "its slices", str(error)
        return
    ranks = max(1, len(parts)) * form.groups * pairs_of(saved.lora.init)
    if saved.noted and saved.file_ranks != ranks:
        yield saved.path, f"has {saved.file_ranks} · r ranks", f"{len(parts)} parts, {form.groups} groups"
    elif (problem := misfit(form, parts, saved.lora.share, saved.lora_A, saved.lora_B)) is not None:
        yield saved.path, "in the file", problem


def slices_in(saved: SavedSite) -> Slices | None:
    """Return the parts of the weight that a site of a file adapts; None for the whole."""
    return None if saved.slices is None else slices_of(saved.slices)


def _factor_text(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    """Return `8 → 16` for linears, all sizes of both factors for the rest."""
    first, second = shapes
    return f"{first[1]} → {second[0]}" if len(first) == 2 and len(second) == 2 else _size_text(shapes)


def _size_text(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    return f"A {list(shapes[0])}, B {list(shapes[1])}"


def _module_mismatches(file: AdapterFile, model: nn.Module) -> Iterator[Mismatch]:
    if not (file.modules or file.header.trained or file.claimed):
        return
    state = {without_wrappers(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, tensor in file.modules.items():
        if name not in state:
            yield name, str(list(tensor.shape)), "has no such tensor"
        elif state[name].shape != tensor.shape:
            yield name, str(list(tensor.shape)), str(list(state[name].shape))
        elif state[name].is_floating_point() != tensor.is_floating_point():
            yield name, str(tensor.dtype), str(state[name].dtype)
    modules = {without_wrappers(path) for path, _ in model.named_modules(remove_duplicate=False)}
    for path in file.header.trained:
        if path not in modules:
            yield path, "trained whole", "has no such module"
    whole = frozenset((*file.header.trained, *(path for path in modules if path.endswith(file.claimed))))
    for name, tensor in state.items():
        if begins_in(name, whole) and name not in file.modules:
            yield name, "missing", str(list(tensor.shape))


def _other_base(file: AdapterFile, sites: dict[str, Site], model: nn.Module) -> Iterator[Mismatch]:
    # of a site that is refused there may be no weight to look at
    usable = {path: site for path, site in sites.items() if site.refusal is None}
    known = {saved.path: usable[saved.path].weight for saved in file.sites if saved.path in usable}
    weights = {path: weight for path, name in known.items() if (weight := _readable(model, name)) is not None}
    for path, values in zip(weights, SampledWeights([*weights.values()]).values(), strict=True):
        if not same_values(file.header.base.get(path), values):
            yield known[path], "trained on other values", "is another base, or was changed since"


def _readable(model: nn.Module, name: str) -> Tensor | None:
    """Return the weight of a site; None where a layer holds codes in its place."""
    return None if is_packed(inside(module_at(model, name.rpartition(".")[0]))) else get_tensor(model, name)


def compared_values(files: Sequence[AdapterFile], decisions: Decisions, model: nn.Module) -> int:
    """Return of how many base weights a file notes values that the model has too."""
    sites = {path: planned.site for planned in decisions.adapted for path in planned.site.paths}
    noted = (saved.path for file in files for saved in file.sites if file.header.base.get(saved.path))
    weights = (_readable(model, name) for name in {sites[path].weight for path in noted if path in sites})
    return sum(weight is not None and sample_values(weight) is not None for weight in weights)


def _refuse(files: Sequence[AdapterFile], sites: dict[str, Site], model: nn.Module) -> None:
    refused = [
        (saved.path, reason)
        for file in files
        for saved in file.sites
        if (reason := _refusal(saved, sites[saved.path], model)) is not None
    ]
    if refused:
        raise RefusedError("the adapter has sites that cannot be adapted", list(dict.fromkeys(refused)))


def _refusal(saved: SavedSite, site: Site, model: nn.Module) -> str | None:
    if unfit := unfit_for_dora(site, saved.lora, saved.calls > 0):
        return unfit
    if saved.added_bias is not None and not site.bias:
        return "its lora_B has a bias (`lora_bias`) and the layer has none to add it to, so PEFT cannot merge it either"
    if not saved.noted and has_other_border(model.get_submodule(site.owner)):
        return (
            "PEFT trains it without the padding_mode and dilation of the convolution, so what was trained is "
            "not a change of its weight alone"
        )
    if saved.lora.invocation and isinstance(model, fx.GraphModule):
        return IN_A_GRAPH
    if unfit := unfit_for_invocation(site, saved.lora):
        return site.refusal or unfit
    if site.refusal or (saved.noted and not is_moved(saved.lora.init)):
        return site.refusal
    lora = replace(saved.lora, init="pissa") if saved.noted else saved.lora  # whichever: its values are in the file
    return unfit_for_init(site, lora, saved.slices is not None, saved.calls > 0)


def _planned(site: Site, saved: tuple[AdapterFile, SavedSite] | None, trained: Sequence[TrainedModule]) -> PlannedSite:
    if saved is None:
        return trained_whole(site, trained) or PlannedSite(site, "keep", "not in the adapter")
    file, saved_site = saved
    per_call = saved_site.calls > 0
    if per_call:
        site = replace(site, calls=saved_site.calls)
    reason, slices = f"from {file.folder.name}", slices_in(saved_site)
    return PlannedSite(site, "adapt", reason, saved_site.rule or None, saved_site.lora, slices, per_call)


def fill(tuned: nn.Module, files: Sequence[AdapterFile], adapter: str | None = None) -> None:
    """Copy the saved values into a freshly adapted model, in place.

    Args:
        tuned: the model.
        files: of adapters that it has.
        adapter: what the model calls the only one, if not as its file does.

    Raises:
        RefusedError: weights on the meta device, where the values would be lost.
    """
    _refuse_meta(tuned, files)
    places = {
        (path, one.call, one.spec.adapter): one
        for site, one in all_attached(tuned)
        for path in {site, one.spec.path, without_wrappers(site)}
    }
    with torch.no_grad(), step("filling", sum(len(file.sites) for file in files), "sites") as doing:
        for file in files:
            for saved in file.sites:
                name = adapter or saved.lora.adapter
                place = places.get((saved.path, saved.call, name))
                _fill_site(place or _under_another_name(tuned, saved.path, saved.call, name), saved)
                doing.advance(saved.path)
            name = adapter or name_of(file)
            _fill_modules(tuned, file.modules | file.biases, name)
            fill_rows(tuned, file, name)


def _fill_modules(tuned: nn.Module, values: Mapping[str, Tensor], adapter: str) -> None:
    """Copy what a file has of modules that were trained whole to the adapter's own values, or else to the model's."""
    added = {without_wrappers(name): value for name, whose, value in added_tensors(tuned) if whose == adapter}
    if not added:
        _untie(tuned, values)
    for name, value in values.items():
        _copy(added.get(name) if added else get_tensor(tuned, name), value)


def _refuse_meta(tuned: nn.Module, files: Sequence[AdapterFile]) -> None:
    factors = [(path, adapter.lora_A.weight) for path, adapter in all_attached(tuned)]
    names = [f"{path}.weight" for file in files for path in file.rows]
    names += [name for file in files for name in (*file.modules, *file.biases)]
    whole = [(name, get_tensor(tuned, name)) for name in names]
    lost = [
        (name, "on the meta device") for name, tensor in (*factors, *whole) if tensor is not None and tensor.is_meta
    ]
    if lost:
        advice = "load its weights (or let accelerate offload them), then the adapter"
        raise RefusedError("the model has no values, and would take none from the file", lost, advice)


def _untie(tuned: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give tied parameters that a file has with unlike values memory of their own, in place: PEFT trains copies."""
    first: dict[int, str] = {}
    for name, value in values.items():
        parameter = get_tensor(tuned, name)
        other = first.setdefault(id(parameter), name)
        if isinstance(parameter, nn.Parameter) and not torch.equal(values[other], value):
            own_parameters(tuned, (name,), parameter.requires_grad)


def _under_another_name(tuned: nn.Module, path: str, call: int | None, name: str) -> Attached:
    """Return the adapter of a shared module by another of its names, or of an attention by PEFT's."""
    found = attached_to(tuned.get_submodule(path))
    return next(one for one in found if one.call == call and one.spec.adapter == name)


def _fill_site(adapter: Attached, saved: SavedSite) -> None:
    if saved.on_residual:
        start_from_weight(adapter)  # as PEFT does when it loads such a file
    decode(adapter, saved.lora_A, saved.lora_B)
    if saved.magnitude is not None:
        assert adapter.magnitude is not None
        _copy(adapter.magnitude.weight, adapter.magnitude.taken(saved.magnitude))
    bias = adapter.trained_bias
    bias = adapter.owner._parameters.get("bias") if bias is None else bias
    if saved.bias is not None:
        _copy(bias, saved.bias)
    if saved.added_bias is not None:
        assert bias is not None
        _copy(bias, whole(bias).to(saved.added_bias) + saved.lora.scaling * saved.added_bias)


def _copy(target: Tensor | None, value: Tensor) -> None:
    assert target is not None
    target.copy_(part_of(value, target))
