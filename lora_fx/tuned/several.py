"""Several adapters on one model: more of them beside those that are there, fewer, or other names; in place."""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from torch import fx, nn

from lora_fx.adapters.adapt import adapt_sites, give_values
from lora_fx.adapters.attach import Attached, adapted_owners, all_attached, attached_to, holders_of, owner_path
from lora_fx.adapters.dicts import KEPT_TARGETS, without_factors
from lora_fx.adapters.factors.spec import ModelRecord
from lora_fx.adapters.parallel import refuse_unplaceable
from lora_fx.adapters.selection import Selection, Switch
from lora_fx.adapters.stacked import forget_kept
from lora_fx.adapters.starting import start_adapters
from lora_fx.adapters.trained import added_rows, added_tensors, keep_alone, trained_names, trained_owners
from lora_fx.errors import RefusedError
from lora_fx.models.between import between_calls, one_at_a_time
from lora_fx.models.collecting import collected_later
from lora_fx.models.joining import apart, refuse_unfit_for_groups
from lora_fx.models.restoring import Held, all_or_nothing
from lora_fx.models.twin import make_twin
from lora_fx.models.wrappers import seen_through
from lora_fx.planning.beside import TOKENS
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import IN_A_GRAPH, PlannedSite, TrainedModule, TrainedRows
from lora_fx.regions.install import regions, remade
from lora_fx.rules.keys import is_adapter_name
from lora_fx.text import dotted
from lora_fx.tuned.asking import ask_layers
from lora_fx.tuned.build import whole_record_in
from lora_fx.tuned.invoking import find_invocations
from lora_fx.tuned.switching import names_of, refuse_unknown, switches_in

_SWITCHED = ("names", "everywhere", "invocations", "whole", "first")
"""What of a switch changes with the adapters that it knows."""


def adapters_called(tuned: nn.Module, name: str) -> Iterator[tuple[str, Attached]]:
    """Yield (path of the site, adapter) for every adapter of this name."""
    return all_attached(tuned, name)


@one_at_a_time
def drop(tuned: nn.Module, adapter: str) -> None:
    """Take an adapter and its parameters away from a model, in place; nothing of another adapter changes.

    Where it was in use, what is left of the selection is.  Every process calls it that holds a part of the model.

    Raises:
        ValueError: there is none of this name.
        RefusedError: it is the only one, or has trained modules or biases of the model itself.
    """
    tuned = seen_through(tuned)
    switches = known_switches(tuned, adapter)
    if all(switch.names == (adapter,) for switch in switches):
        raise RefusedError(f"'{adapter}' is the only adapter", advice="lora_fx.remove returns the base model")
    _refuse_shared(tuned, adapter)
    record = whole_record_in(tuned)
    with apart(tuned, needed=False), changing(tuned, record):  # else groups hold what is gone
        ask_layers(tuned)
        take_off(tuned, record, (adapter,))
        tuned.__dict__.pop(KEPT_TARGETS, None)  # of a swap: it would hold the tensors that are gone


@one_at_a_time
def rename(tuned: nn.Module, adapter: str, name: str) -> None:
    """Give an adapter of a model another name, in place: its keys change with it, its values and its use do not.

    Raises:
        ValueError: there is none of this name, or the new one cannot be a name, or is another adapter's.
    """
    tuned = seen_through(tuned)
    switches = known_switches(tuned, adapter)
    if name == adapter:
        return
    refuse_name(name, names_of(switches))
    record = whole_record_in(tuned)
    with changing(tuned, record, renamed=adapter):
        ask_layers(tuned)
        for owner in tuned.modules():
            for one in attached_to(owner):
                if one.spec.adapter == adapter:
                    one.spec.lora = replace(one.spec.lora, adapter=name)
            for holder in holders_of(owner):
                items = [(name if key == adapter else key, module) for key, module in holder._modules.items()]
                holder._modules.clear()
                holder._modules.update(items)
        for _, _, state in trained_owners(tuned):
            state.renamed({adapter: name})
        record.switch.renamed({adapter: name})
        if adapter in record.added:
            record.added[name] = record.added.pop(adapter)


@contextlib.contextmanager
def changing(tuned: nn.Module, record: ModelRecord, renamed: str = "") -> Iterator[None]:
    """Return a context in which the adapters of a model change in place: if anything ends it early, all is as before.

    Values of adapters that were there are not kept, nor what else their factors are: nothing changes these.  Nor are
    names, but for that of the one to be renamed.  Calls in other threads see what was before, or what is after.
    """
    held: list[Held] = [(record, ("added",)), (record.switch, _SWITCHED)]
    held += [(one.spec, ("lora",)) for _, one in all_attached(tuned, renamed)]  # none: each adapter has a name
    held += [(state, ("base", "owners", "spare")) for _, _, state in trained_owners(tuned)]
    held += [(region, ("block", "mine")) for _, _, region in regions(tuned)]
    with between_calls(tuned), collected_later(), all_or_nothing(without_factors(tuned), held, graphs=True):
        yield


def known_switches(tuned: nn.Module, adapter: str) -> list[Switch]:
    """Return the switches of a model that know the adapter.

    Raises:
        ValueError: none does.
    """
    switches = switches_in(tuned)
    refuse_unknown([adapter], names_of(switches))
    return [switch for switch in switches if adapter in switch.names]


def check_trainable(trainable: object) -> None:
    """Raise ValueError for what does not say whether a new adapter is trained."""
    if not isinstance(trainable, bool):
        raise ValueError(f"trainable is {trainable!r}; it must be True or False")


def refuse_name(name: str, known: Collection[str]) -> None:
    """Raise ValueError for what cannot be a new adapter's name."""
    if not is_adapter_name(name):
        raise ValueError(f"an adapter cannot be called {name!r}: letters, digits and _, a letter first")
    if name in known:
        cure = 'take another name (adapter="b"), or drop or rename that one'
        raise ValueError(f"there is an adapter called '{name}' already; {cure}")


def _refuse_shared(tuned: nn.Module, adapter: str) -> None:
    """Raise RefusedError where the model's own values were trained with an adapter that is to go."""
    facts = [
        (dotted(path, name), "is trained whole")
        for path, _, state in trained_owners(tuned)
        for name, owners in state.owners.items()
        if adapter in (owners or ())
    ]
    if facts:
        advice = "lora_fx.save what is to be kept, and add it to a model that `apply` makes"
        raise RefusedError(f"'{adapter}' cannot be dropped: the model's own values are its", facts, advice)


def _refuse_trained(tuned: nn.Module, plan: Plan) -> None:
    """Raise RefusedError for sites whose weights are trained whole: there, W is not the base's."""
    values = {dotted(path, name) for path, _, state in trained_owners(tuned) for name in state.base}
    facts = [(site.path, "is trained whole") for site in plan.adapted if site.site.weight in values]
    inside = tuple(f"{trained.path}." for trained in plan.train)
    rows = {planned.weight for planned in plan.tokens}
    for path, one in all_attached(tuned) if inside or rows else ():
        if f"{path}.".startswith(inside) or dotted(owner_path(path, one), one.spec.parameter) in rows:
            facts.append((path, "has an adapter"))
    if facts:
        advice = "leave these sites out, or the module out of `train:` and `tokens:`"
        raise RefusedError("an adapter cannot stand beside a weight that another one trains whole", facts, advice)


def _refuse_own(tuned: nn.Module, plan: Plan) -> None:
    """Raise RefusedError for weights of a GraphModule itself: nothing that they hang on can show more than one."""
    facts = [(site.path, "its weight is the GraphModule's own") for site in plan.adapted if not site.site.owner]
    if facts and isinstance(tuned, fx.GraphModule):
        advice = "adapt the model that the graph was made from"
        raise RefusedError("an adapter cannot be put beside others at these", facts, advice)


def _refuse_invocations(tuned: nn.Module, plan: Plan) -> None:
    """Raise RefusedError for adapters with an invocation in a GraphModule."""
    facts = [(site.path, IN_A_GRAPH) for site in plan.adapted if site.lora is not None and site.lora.invocation]
    if facts and isinstance(tuned, fx.GraphModule):
        raise RefusedError("an adapter with an invocation cannot be put beside others at these", facts)


def refuse_trained_together(tuned: nn.Module, adapter: str) -> None:
    """Raise RefusedError where values of the model were trained with an adapter and with others as well."""
    facts = [
        (dotted(path, name), f"was trained with {', '.join(owners)} together")
        for path, _, state in trained_owners(tuned)
        for name, owners in state.owners.items()
        if owners and adapter in owners and len(owners) > 1
    ]
    if facts:
        raise RefusedError(f"'{adapter}' alone would not be what was trained", facts, "take all adapters together")


def only(tuned: nn.Module, adapter: str) -> nn.Module:
    """Return a twin with one of a model's adapters alone, in use as it was trained; the model stays unchanged.

    What it trains of the model itself stays in it.

    Raises:
        ValueError: there is none of this name.
        RefusedError: parts of the model were trained with it and others; it is a GraphModule with several in its graph.
    """
    if [switch.names for switch in switches_in(tuned)] != [(adapter,)]:
        known_switches(tuned, adapter)
    refuse_trained_together(tuned, adapter)
    twin = make_twin(tuned, freeze=False)
    record = whole_record_in(twin)
    if len(record.switch.names) > 1:
        ask_layers(twin)
    plan = _plan_of(twin, record, adapter)
    keep_alone(twin, adapter)
    take_off(twin, record, [name for name in record.switch.names if name != adapter])
    record.plan, record.added, record.switch.everywhere = plan, {}, Selection.of([adapter])
    return twin


def _plan_of(tuned: nn.Module, record: ModelRecord, adapter: str) -> Plan:
    """Return the plan by which a model would have got one of its adapters alone."""
    plan = record.added.get(adapter, record.plan)
    own = {one.spec.path: one.spec.lora for _, one in adapters_called(tuned, adapter)}
    sites = tuple(
        replace(site, lora=own[site.path])
        if site.path in own
        else PlannedSite(site.site, "keep", "of another adapter")
        if site.decision == "adapt"
        else site
        for site in plan.sites
    )
    owned = _plan_with(tuned, record, adapter)
    trained = {"train": owned.train, "biases": owned.biases} if owned is not None else {"train": (), "biases": ()}
    return replace(plan, sites=sites, tokens=tuple(rows_with(tuned, adapter)), **trained)


def trained_with(tuned: nn.Module, record: ModelRecord, adapter: str) -> Sequence[TrainedModule]:
    """Return the modules that an adapter trains whole: with values of its own, or with the model's."""
    plan = _plan_with(tuned, record, adapter)
    return () if plan is None else plan.train


def biases_with(tuned: nn.Module, record: ModelRecord, adapter: str) -> Sequence[TrainedModule]:
    """Return the biases that an adapter trains beside those of its sites."""
    plan = _plan_with(tuned, record, adapter)
    return () if plan is None else plan.biases


def trained_beside(tuned: nn.Module, record: ModelRecord, names: Collection[str]) -> list[tuple[str, str]]:
    """Return (name, whose it is) for the model's own rows, biases and modules that adapters of these names train."""
    rows = [(name, f"'{whose}' trains rows of it") for name, whose, _ in added_rows(tuned) if whose in names]
    return rows + [
        (one.path, f"'{name}' trains it")
        for name in names
        for one in (*trained_with(tuned, record, name), *biases_with(tuned, record, name))
    ]


def _plan_with(tuned: nn.Module, record: ModelRecord, adapter: str) -> Plan | None:
    """Return the plan by which an adapter trains parts of the model itself, if it does."""
    if any(whose == adapter for _, whose, _ in added_tensors(tuned)):
        return record.added[adapter]
    return None if adapter in record.added else record.plan


def rows_with(tuned: nn.Module, adapter: str) -> Iterator[TrainedRows]:
    """Yield the rows of the model's weights that an adapter trains alone; the first of tied ones are an embedding's."""
    found = [(name, rows) for name, whose, rows in added_rows(tuned) if whose == adapter]
    modules = dict(tuned.named_modules())
    found.sort(key=lambda pair: not isinstance(modules[pair[0].rpartition(".")[0]], nn.Embedding))
    first: dict[int, str] = {}
    for name, rows in found:
        source = first.setdefault(id(rows), name)
        tied_to, number = ("", rows.rows.numel()) if source == name else (source, 0)
        yield TrainedRows(name, rows.ids, number, adapter, TOKENS, tied_to)


def attach_more(tuned: nn.Module, plan: Plan, record: ModelRecord, start: bool) -> None:
    """Put the adapters of a plan beside those that a model has, in place; they are not used until they are chosen.

    In a context of `changing`: what ends this early leaves some of each.
    What runs as graphs goes on doing so: graphs of blocks with new sites are written anew, and nothing is captured.
    `start` says whether those that begin as parts of their weights do so: not where values from a file will come.
    """
    _refuse_trained(tuned, plan)
    _refuse_own(tuned, plan)
    _refuse_invocations(tuned, plan)
    ask_layers(tuned)
    names = plan.adapters
    before = {id(owner) for owner in adapted_owners(tuned)}
    record.switch.names = (*record.switch.names, *names)
    record.switch.additions += 1
    record.added |= dict.fromkeys(names, replace(plan, capture=None))
    adapt_sites(tuned, plan, record)
    find_invocations(tuned)
    if start:
        start_adapters(tuned, plan)
    changed = {id(owner) for name in names for owner in give_values(tuned, plan, record, name)}
    refuse_unplaceable(tuned, names)
    refuse_unfit_for_groups(tuned)
    remade(tuned, changed | {id(owner) for owner in adapted_owners(tuned)} - before)


def take_off(tuned: nn.Module, record: ModelRecord, names: Collection[str]) -> None:
    """Take adapters and their parameters away from a model, in place."""
    for module in tuned.modules():
        for holder in holders_of(module):
            for name in names:
                holder._modules.pop(name, None)
    forget_kept(tuned)
    record.switch.renamed(dict.fromkeys(names))
    left = trained_names(tuned) if record.switch.whole else set()
    record.switch.whole = tuple(name for name in record.switch.whole if name in left)
    for name in names:
        record.added.pop(name, None)
