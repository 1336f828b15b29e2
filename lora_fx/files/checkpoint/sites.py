"""Decides what a merge does: every site, bias and whole module of the adapters is found in the checkpoint, or refused.

Everything is decided, and every problem is found, before the first byte is written.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lora_fx.errors import MOST_SHOWN, AdapterMismatchError, MergeError
from lora_fx.files.adapter.codec import mixes_groups
from lora_fx.files.adapter.names import ends_of, has_end
from lora_fx.files.adapter.noted import slices_of
from lora_fx.files.adapter.read import AdapterFile
from lora_fx.files.adapter.site import SavedSite
from lora_fx.files.checkpoint import tied
from lora_fx.files.checkpoint.basefiles import BaseCheckpoint
from lora_fx.files.checkpoint.names import Prefix, find_prefix, no_such_key
from lora_fx.files.checkpoint.ontocodes import onto_codes
from lora_fx.files.checkpoint.plan import LowRankTerm, MergePlan, OutTensor, PlainWork, Value, WeightFold
from lora_fx.files.covariances import Covariances
from lora_fx.files.fingerprint import same_values
from lora_fx.files.safetensors import RawFile, RawTensor
from lora_fx.files.values import DTYPES, FLOATS, NAME_OF, sample
from lora_fx.planning.planned import FROM_AN_INVOCATION
from lora_fx.planning.sites import Layout

Located = tuple[RawFile, RawTensor]
_Placed = tuple[SavedSite, str, Located | str]
"""A site, the key of its weight, and where that is or why it is not there."""
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Those of transformers that store their linears as [in, out]."""


def plan_merge(
    base: BaseCheckpoint,
    adapters: Sequence[AdapterFile],
    out_dtype: torch.dtype | None,
    covariances: Covariances | None = None,
) -> MergePlan:
    """Return what becomes of every tensor of the checkpoint.

    Raises:
        AdapterMismatchError: names or shapes that the checkpoint does not have, or another base; all of them.
        MergeError: what cannot be merged here, with the reason for each.
    """
    _refuse_quantised(base, out_dtype)
    _refuse_wrapped(base, [site.stem for adapter in adapters for site in adapter.sites])
    planner = _Planner(base)
    for adapter in adapters:
        planner.place(adapter)
    if planner.mismatches:
        raise AdapterMismatchError("the adapter does not fit this checkpoint", planner.mismatches)
    works = planner.works()
    tokens = [key for key, work in works.items() if base.is_token_weight(key, _shape_of(work))]
    ensured = any(adapter.config.ensure_weight_tying for adapter in adapters)
    refusals = [*planner.refusals, *tied.refusals(base, tokens, ensured)]
    if refusals:
        refused = list(dict.fromkeys(refusals))
        raise MergeError("the adapter cannot be merged into this checkpoint; nothing was written", refused)
    additions = tuple(_addition(key, works.pop(key)) for key in [*works] if base.find(key) is None)
    if additions and base.quantised is not None:
        added = [(addition.name, "would be read as codes, or not at all") for addition in additions]
        raise MergeError(f"{base.folder}: is quantised, and its config.json tells of no more layers", added)
    done = onto_codes(base, works, planner.paths, covariances)
    return MergePlan(base, done, additions, tied.needs_untying(base, tokens), out_dtype)


def _refuse_quantised(base: BaseCheckpoint, out_dtype: torch.dtype | None) -> None:
    reason = base.quantised
    if isinstance(reason, tuple) and out_dtype is not None:
        raise MergeError(f"{base.folder}: is quantised, and codes have no other dtype", advice="leave out_dtype out")
    if isinstance(reason, str):
        raise MergeError(
            f"{base.folder}: is quantised, and quantised weights cannot be merged into here; nothing was written",
            [("quantization_config", reason)],
            "give the checkpoint that it was quantised from, or load the model and use lora_fx.merge",
        )


def _refuse_wrapped(base: BaseCheckpoint, sites: Sequence[str]) -> None:
    """transformers writes PEFT's layers into a checkpoint when an adapter was deleted, and finds no weight in it."""
    layers = {key: key.partition(".base_layer.")[0] for key in base.keys() if ".base_layer." in key}  # noqa: SIM118
    names, ends = frozenset(sites), {end for site in sites for end in ends_of(site)} if layers else set()
    adapted = {layer for layer in layers.values() if layer in ends or has_end(layer, names)}
    wrapped = [(key, "is inside of a layer of PEFT's") for key, layer in layers.items() if layer in adapted]
    if wrapped:
        raise MergeError(
            f"{base.folder}: was saved with PEFT's layers in it, and from_pretrained would make up their weights",
            wrapped[:6],
            "give the checkpoint that the adapter was trained on",
        )


@dataclass(slots=True)
class _Planner:
    """What was decided so far, and every problem."""

    base: BaseCheckpoint
    folds: dict[str, list[WeightFold]] = field(default_factory=dict)
    values: dict[str, list[Value]] = field(default_factory=dict)
    mismatches: list[tuple[str, str, str]] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)
    """Of the sites, by the keys of their weights."""

    def place(self, adapter: AdapterFile) -> None:
        """Find what one adapter changes in the checkpoint."""
        sites, label = adapter.sites, (str(adapter.folder),)
        names = {site.path: _weight_name(site) for site in sites}
        tokens = {site.path for site in sites if self.base.is_token_weight(names[site.path], _shape(site))}
        prefix = find_prefix([name for path, name in names.items() if path not in tokens], self.base)
        placed = [(site, *self._locate(names[site.path], _shape(site), prefix)) for site in sites]
        usual = _usual_layout(adapter, self.base, placed)
        for site, key, where in placed:
            if isinstance(where, str):
                self.mismatches.append((key, "adapted", where))
            else:
                self._place_site(adapter, site, key, where, usual)
            if site.bias is not None:
                self._place_value(f"{site.path}.bias", Value(site.bias, label), prefix, is_site=True)
        for name, tensor in adapter.modules.items():
            self._place_value(name, Value(tensor, label), prefix, is_site=False)
        for name, tensor in adapter.biases.items():
            self._place_value(name, Value(tensor, label), prefix, is_site=True)
        trained = [(path, "trains rows of it alone") for path in adapter.rows]
        trained += [(site.path, "lora_B has a bias") for site in sites if site.added_bias is not None]
        trained += [(site.path, f"{site.lora.init}: is for a rest of the base") for site in sites if site.on_residual]
        self.refusals += [(path, f"{what}; load the model and use lora_fx.merge") for path, what in trained]
        self.refusals += [(site.path, FROM_AN_INVOCATION) for site in sites if site.lora.invocation]
        for name, tensor in adapter.loose.items():
            self._place_value(name, Value(tensor, label), prefix, is_site=True)

    def _key(self, name: str, prefix: Prefix) -> str:
        """Return the key of a name; the name itself where the prefix gives none (a head beside a bare model)."""
        key = prefix.key(name)
        return name if key is None or self.base.find(key) is None else key

    def _locate(self, name: str, shape: tuple[int, ...], prefix: Prefix) -> tuple[str, Located | str]:
        """Return the key of a weight and where it is: for a head that is tied, where the embedding is."""
        key = self._key(name, prefix)
        where = self.base.find(key)
        if where is not None:
            return key, where
        is_token = self.base.is_token_weight(key, shape)
        return key, tied.shared_weight(self.base, shape) if is_token else "has no such key"

    def _place_site(
        self, adapter: AdapterFile, site: SavedSite, key: str, where: Located, usual: Layout | None
    ) -> None:
        file, entry = where
        possible = _layouts(site, entry)
        coded = self.base.coded(key)
        possible = possible if coded is None else tuple(way for way in possible if way == "out_in")
        refusal = coded if isinstance(coded, str) else _refusal(site, key, entry, possible, usual, coded is not None)
        if refusal is not None:
            self.refusals.append((key, refusal))
        elif not possible:
            self.mismatches.append((key, str(list(_shape(site))), str(list(entry.shape))))
        elif not same_values(adapter.header.base.get(site.path), sample(file, entry)):
            self.mismatches.append((key, "trained on other values", "is another base, or was changed since"))
        else:
            chosen = possible[0] if len(possible) == 1 or usual is None else usual
            self.paths[key] = site.path
            self.folds.setdefault(key, []).append(_fold(adapter, site, file, entry, chosen))

    def _place_value(self, name: str, value: Value, prefix: Prefix, is_site: bool) -> None:
        """Note a tensor that replaces the base's; a whole module that the base lacks (a new head) is added."""
        key, tensor = self._key(name, prefix), value.tensor
        where = self.base.find(key)
        if self.base.coded(key) is not None:
            self.refusals.append((key, "is held as codes here, and trained whole: nothing is quantised anew here"))
        elif where is None and (is_site or prefix.gained):
            self.mismatches.append((key, str(list(tensor.shape)), self._no_such_key(key)))
        elif where is not None and where[1].shape != tuple(tensor.shape):
            self.mismatches.append((key, str(list(tensor.shape)), str(list(where[1].shape))))
        elif where is not None and not _convertible(tensor, where[1].dtype):
            self.refusals.append((key, f"is stored as {where[1].dtype}, the adapter has {tensor.dtype}"))
        else:
            self.values.setdefault(key, []).append(value)

    def _no_such_key(self, key: str) -> str:
        return no_such_key(key, self.base) if len(self.mismatches) < MOST_SHOWN // 10 else "has no such key"

    def works(self) -> dict[str, PlainWork]:
        """Return one work for each key, of all adapters together."""
        works: dict[str, PlainWork] = {key: self._united(key, folds) for key, folds in self.folds.items()}
        return works | {key: self._only(key, values) for key, values in self.values.items()}

    def _united(self, key: str, folds: Sequence[WeightFold]) -> WeightFold:
        """Return one fold for all adapters of a weight; their deltas are added before anything is rounded."""
        if len(folds) > 1 and any(fold.magnitude is not None for fold in folds):
            self.refusals.append((key, "has DoRA and another adapter: the result would depend on their order"))
        if key in self.values:
            self.refusals.append((key, "is adapted, and trained whole too"))
        terms = tuple(term for fold in folds for term in fold.terms)
        return replace(folds[0], terms=terms, adapters=tuple(name for fold in folds for name in fold.adapters))

    def _only(self, key: str, values: Sequence[Value]) -> Value:
        if any(not torch.equal(value.tensor, values[0].tensor) for value in values[1:]):
            names = ", ".join(name for value in values for name in value.adapters)
            self.refusals.append((key, f"is trained whole by several adapters, with other values: {names}"))
        return values[0]


def _weight_name(site: SavedSite) -> str:
    """Return the name of a site's weight; that of a raw parameter is its own."""
    return site.parameter or f"{site.path}.weight"


def _shape(site: SavedSite) -> tuple[int, ...]:
    return (site.lora_B.shape[0], *site.lora_A.shape[1:])


def _usual_layout(adapter: AdapterFile, base: BaseCheckpoint, placed: Sequence[_Placed]) -> Layout | None:
    """Return how square weights of a file of PEFT's are stored, None where the signs contradict each other.

    PEFT's switch is one for a whole adapter, and the last linear it met has set it; so the shapes of the others and the
    kind of model must agree with it.
    """
    signs: set[Layout] = {"in_out" if adapter.config.fan_in_fan_out else "out_in"}
    for site, key, where in placed:
        if not isinstance(where, str) and not base.is_token_weight(key, where[1].shape):
            ways = _fitting(site, where[1])
            signs |= set(ways) if len(ways) == 1 else set()
    if (base.config or {}).get("model_type") in _CONV1D_MODELS:
        signs.add("in_out")
    return signs.pop() if len(signs) == 1 else None


def _refusal(
    site: SavedSite, key: str, entry: RawTensor, possible: Sequence[Layout], usual: Layout | None, coded: bool
) -> str | None:
    if site.calls:
        return "has an adapter of its own for each call, which no one weight can hold"
    if entry.dtype not in FLOATS and not coded:
        return f"is stored as {entry.dtype}: quantised weights cannot be merged into here"
    if len(entry.shape) == 3 and site.lora_A.dim() == 2 and not (possible and "expert" not in key):
        return f"is a bank of experts {list(entry.shape)}; load the model and use lora_fx.merge"
    if site.lora_B.dim() > 2 and site.lora_A.shape[0] != site.lora_B.shape[1]:
        groups = site.lora_A.shape[0] // site.lora_B.shape[1]
        ours = f"is a convolution in {groups} groups, whose factors are blocks; load the model and use lora_fx.merge"
        return ours if site.noted else mixes_groups(groups)
    if site.magnitude is not None and site.slices is not None:
        try:
            slices_of(site.slices).rows(site.magnitude.numel())
        except ValueError as problem:
            return f"its slices: {problem}"
    if len(possible) > 1 and usual is None:
        return f"is square {list(entry.shape)}, and the adapter does not tell whether it is [out, in] or [in, out]"
    return None


def _layouts(site: SavedSite, entry: RawTensor) -> tuple[Layout, ...]:
    """Return the ways in which the weight may be stored; what lora_fx has noted leaves one.

    The file has the factors of a raw parameter as it is stored.
    """
    ways = _fitting(site, entry)
    if not site.noted or len(ways) < 2:
        return ways
    return ("out_in",) if site.parameter else (site.layout,)


def _fitting(site: SavedSite, entry: RawTensor) -> tuple[Layout, ...]:
    """Return the ways in which the product of the factors has the shape of the weight: none, one, or both if square.

    A convolution's factors are [r, in, …] and [out, r, 1, …], or flat; an embedding is [in, out] for one-hot tokens.
    """
    out, inner = site.lora_B.shape[0], tuple(site.lora_A.shape[1:])
    shape, ways = entry.shape, []
    is_flat = len(inner) == 1 and math.prod(shape[1:]) == inner[0]
    if not site.embedding and shape and shape[0] == out and (shape[1:] == inner or is_flat):
        ways.append("out_in")
    if len(inner) == 1 and shape == (inner[0], out):
        ways.append("in_out")
    multiply = site.lora_B.numel() == out * site.lora_A.shape[0]
    return tuple(ways) if multiply and len(shape) > 1 else ()  # type: ignore[arg-type]


def _fold(adapter: AdapterFile, site: SavedSite, file: RawFile, entry: RawTensor, chosen: Layout) -> WeightFold:
    A, B = site.lora_A.flatten(1), site.lora_B.flatten(1)
    left, right = (B, A) if chosen == "out_in" else (A.t(), B.t())
    return WeightFold(
        file=file,
        base=entry,
        rows=entry.shape[0],
        columns=math.prod(entry.shape[1:]),
        terms=(LowRankTerm(left, right, site.lora.scaling),),
        adapters=(str(adapter.folder),),
        magnitude=_lengths(site),
        outputs_first=(chosen == "out_in") != (bool(site.parameter) and site.layout == "in_out"),
    )


def _lengths(site: SavedSite) -> Tensor | None:
    """Return DoRA's lengths of all outputs, NaN for those that are in no adapted part; None for plain LoRA."""
    if site.magnitude is None or site.slices is None:
        return None if site.magnitude is None else site.magnitude.flatten()
    given = site.magnitude.flatten()
    rows = [row for part in slices_of(site.slices).rows(len(given)) for row in part]
    lengths = torch.full_like(given, math.nan)
    lengths[rows] = given[rows]
    return lengths


def _convertible(tensor: Tensor, dtype: str) -> bool:
    return (dtype in FLOATS and tensor.is_floating_point()) or DTYPES.get(dtype) == tensor.dtype


def _shape_of(work: PlainWork) -> tuple[int, ...]:
    return work.base.shape if isinstance(work, WeightFold) else tuple(work.tensor.shape)


def _addition(key: str, work: PlainWork) -> OutTensor:
    if isinstance(work, WeightFold):
        dtype, shape = work.base.dtype, work.base.shape
    else:
        dtype, shape = NAME_OF[work.tensor.dtype], tuple(work.tensor.shape)
    return OutTensor(key, RawTensor(dtype, shape, 0, 0), None, work)
