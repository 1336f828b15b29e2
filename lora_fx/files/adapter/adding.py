"""Adapters from rules, files or other models beside those that a model has; and other values for one of them."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from torch import nn

from lora_fx.adapters.attach import with_values
from lora_fx.adapters.factors.spec import ModelRecord
from lora_fx.adapters.parallel import placed_beside
from lora_fx.adapters.trained import added_rows, added_tensors
from lora_fx.discovery.sites import take_inventory, uses_in
from lora_fx.files.adapter import peftfiles
from lora_fx.files.adapter.read import AdapterFile, read_adapters
from lora_fx.files.adapter.resolve import resolved
from lora_fx.files.adapter.restore import check, decided, fill, in_turn, name_of
from lora_fx.files.adapter.swapping import from_file, refuse_more
from lora_fx.files.adapter.write import save
from lora_fx.models.between import one_at_a_time
from lora_fx.models.collecting import collected_later
from lora_fx.models.joining import apart
from lora_fx.models.modes import normal_tensors
from lora_fx.models.restoring import write_together
from lora_fx.models.wrappers import seen_through
from lora_fx.planning.decide import decide, on_modules
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import Inventory
from lora_fx.rules.given import is_whole
from lora_fx.rules.keys import RANK
from lora_fx.rules.peftwords import answering_peft
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import RuleSet
from lora_fx.rules.short import Target, rules_or_short
from lora_fx.text import listing
from lora_fx.tuned.build import check_refusals, record_in, whole_record_in
from lora_fx.tuned.several import adapters_called, attach_more, changing, check_trainable, refuse_name
from lora_fx.tuned.undo import removed

Source: TypeAlias = str | os.PathLike[str] | Mapping[str, object] | RuleSet | nn.Module
"""Rules, the directory of an adapter, or an adapted model."""


@answering_peft
def add(
    tuned: nn.Module,
    source: Source | None = None,
    *,
    adapter: str | None = None,
    target: Target | None = None,
    r: int | None = None,
    alpha: float | None = None,
    rank: int | None = None,
    trainable: bool = True,
) -> None:
    """Put one more adapter on an adapted model, in place, beside those that are there.

    It is not used before `lora_fx.use` says so; base weights and other adapters stay as they are, and nothing is
    captured again.  All sites or none get it.  Every process calls it that holds a part of the model, with the same
    arguments; factors get the values of the first.

    Args:
        tuned: an adapted model.
        source: rules as for `plan` (the adapter starts as `apply` starts it), the directory of a saved adapter, or
            another adapted model with one adapter, whose values are copied.
        adapter: its name; None takes that of the rules or the file.
        target: in place of a source, as for `apply`, as are `r` and `alpha`: `add(tuned, r=8, target="mlp")`.
        rank: of every site of a saved adapter, filled up with zeros, so that `lora_fx.swap` has room for others.  None
            leaves the ranks as they are.
        trainable: whether its parameters require a gradient.

    Raises:
        ValueError: the name is taken or cannot be one, or the source has several adapters and one name is given.
        RuleError, NoMatchError, RefusedError: as `apply`; also where one adapter trains a module whole and another has
            sites in it.
        AdapterFileError, AdapterMismatchError: as `load`; also for an adapter of another base.
    """
    tuned = seen_through(tuned)
    given: Source = rules_or_short(source, target, r, alpha)
    if isinstance(given, nn.Module):
        whole_record_in(tuned)
        with tempfile.TemporaryDirectory() as folder:
            save(with_values(seen_through(given)), folder)  # before: nobody holds one model and waits for another
            _add(tuned, folder, adapter, rank, trainable)
    else:
        _add(tuned, given, adapter, rank, trainable)


@one_at_a_time
def _add(tuned: nn.Module, given: Source, adapter: str | None, rank: int | None, trainable: bool) -> None:
    record = whole_record_in(tuned)
    if adapter is not None:
        refuse_name(adapter, record.switch.names)
    check_trainable(trainable)
    with apart(tuned), collected_later(), normal_tensors():
        if _is_directory(given):
            _add_read(tuned, record, read_adapters(given), adapter, rank, trainable)  # type: ignore[arg-type]
            return
        rules = read_rules(given)  # type: ignore[arg-type]
        plan = _named(on_modules(decide(rules, _inventory(tuned, record.plan, _asks_base(rules)))), adapter)
        check_refusals(plan)
        if rank is not None:
            raise ValueError("rank is for adapters of files and models; rules have ranks of their own")
        with changing(tuned, record):
            _attach(tuned, record, plan, None, trainable)


def _inventory(tuned: nn.Module, plan: Plan, with_modules: bool) -> Inventory:
    """Return the inventory of an adapted model's base: its plan has every site; modules are asked of the base."""
    if with_modules:
        return take_inventory(removed(tuned), uses_in(plan))
    return Inventory(plan.model, tuple(planned.site for planned in plan.sites), (), plan.total)


def _asks_base(rules: RuleSet) -> bool:
    """Whether rules are about more of the model than its sites."""
    return bool(rules.train or rules.tokens or rules.all_biases)


def _is_directory(source: object) -> bool:
    if not isinstance(source, str | os.PathLike):
        return False
    return os.path.isdir(source)


def add_adapter(tuned: nn.Module, file: AdapterFile) -> None:
    """Put an adapter that has been read beside those of an adapted model, in place, as `add` does."""
    _add_read(tuned, whole_record_in(tuned), [file], None, None, True)


def _add_read(
    tuned: nn.Module,
    record: ModelRecord,
    read: Sequence[AdapterFile],
    adapter: str | None,
    rank: int | None,
    trainable: bool,
) -> None:
    base = removed(tuned)
    files = resolved(read, base)
    peftfiles.warn_of_missing(files[0], base)
    inventory = take_inventory(base, uses_in(record.plan))
    check(files, inventory, base)
    _add_beside(tuned, record, files, inventory, adapter, rank, trainable)


def fill_all(twin: nn.Module, files: Sequence[AdapterFile], inventory: Inventory) -> None:
    """Copy the values of all files into a twin that was adapted as `decisions_in` says, in place.

    A file that shares weights with one before it becomes an adapter beside, which is not in use.
    """
    together, rest = in_turn(files, inventory)
    fill(twin, together)
    peftfiles.refuse_beyond_peft(twin, together)
    record = record_in(twin)
    plans = {name_of(file): replace(record.plan, rules=file.header.rules) for file in together[1:]}
    record.added |= plans
    if rest:
        _add_beside(twin, record, rest, inventory, None, None, True)


def _add_beside(
    tuned: nn.Module,
    record: ModelRecord,
    files: Sequence[AdapterFile],
    inventory: Inventory,
    adapter: str | None,
    rank: int | None,
    trainable: bool,
) -> None:
    """Add the adapters of files that fit, all or none."""
    names = [name_of(file) for file in files] if adapter is None else [adapter]
    if len(names) < len(files):
        told = ", ".join(map(name_of, files))
        raise ValueError(f"there are several adapters in it ({told}), and one name: leave `adapter` out")
    plans = [_of_rank(_named(on_modules(decided([file], inventory)), adapter), rank) for file in files]
    for name in names:
        refuse_name(name, record.switch.names)
    with changing(tuned, record):
        for plan, file in zip(plans, files, strict=True):
            _attach(tuned, record, plan, file, trainable, padded=rank is not None)


def _named(plan: Plan, name: str | None) -> Plan:
    """Return the plan with its adapter under this name."""
    if name is None:
        return plan
    if len(plan.adapters) > 1:
        told = ", ".join(plan.adapters)
        raise ValueError(f"there are several adapters in it ({told}), and one name: leave `adapter` out")
    loras = {id(site.lora): site.lora for site in plan.sites}  # most sites have one together
    own = {key: lora and replace(lora, adapter=name) for key, lora in loras.items()}
    sites = [site if site.lora is None else replace(site, lora=own[id(site.lora)]) for site in plan.sites]
    tokens = tuple(replace(rows, adapter=name) for rows in plan.tokens)
    return replace(plan, sites=tuple(sites), tokens=tokens)


def _of_rank(plan: Plan, rank: int | None) -> Plan:
    """Return the plan with this rank at every site, and the scalings as they are."""
    loras = {site.path: site.lora for site in plan.sites if site.lora is not None}
    if rank is None:
        return plan
    if not is_whole(rank, 1, RANK["maximum"]):
        raise ValueError(f"rank is {rank!r}; it must be a rank from 1 to {RANK['maximum']}")
    above = [f"{path} has rank {lora.r}" for path, lora in loras.items() if lora.r > rank]
    if above:
        raise ValueError(f"rank is {rank}, and {listing(above)}")
    wide = {path: replace(lora, r=rank, alpha=lora.scaling * rank, rslora=False) for path, lora in loras.items()}
    sites = (replace(site, lora=wide[site.path]) if site.path in wide else site for site in plan.sites)
    return replace(plan, sites=tuple(sites))


def _attach(
    tuned: nn.Module,
    record: ModelRecord,
    plan: Plan,
    file: AdapterFile | None,
    trainable: bool,
    padded: bool = False,
) -> None:
    names = plan.adapters
    for name in names:
        refuse_name(name, record.switch.names)
    attach_more(tuned, plan, record, start=file is None)
    if file is not None:
        if padded:
            refuse_more(file)
            write_together(from_file(list(adapters_called(tuned, names[0])), file))
        else:
            fill(tuned, [file], names[0])
        peftfiles.refuse_beyond_peft(tuned, [file])
    placed_beside(tuned, names)
    if trainable:
        return  # as all that is new is
    for name in names:
        for _, one in adapters_called(tuned, name):
            for parameter in one.trained():
                parameter.requires_grad_(False)
    own = [(whose, value) for _, whose, value in added_tensors(tuned)]
    own += [(whose, rows.rows) for _, whose, rows in added_rows(tuned)]
    for whose, value in own:
        if whose in names and isinstance(value, nn.Parameter):
            value.requires_grad_(False)
