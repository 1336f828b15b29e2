"""What is decided of each site, each module and each region of a model, and the notes on it.  Pure data; no torch."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lora_fx.planning.sites import CONVOLUTIONS, Backend, Site
from lora_fx.rules.inits import FRESH, FROM_INPUTS, ranks_needed
from lora_fx.rules.ruleset import LoRAConfig, Slices, are_neighbours
from lora_fx.text import listing

Decision = Literal["adapt", "train", "keep", "skip", "refuse"]
NOT_RUN = "the model does not run on its sample inputs here"
"""How a plan's note begins that tells that nothing was seen of the model in use."""
DEAD = "never used with the example inputs"
FROM_AN_INVOCATION = "acts from its invocation on, and one weight serves every token"
"""Why an adapter cannot be folded into its weight."""
IN_A_GRAPH = "the graph of a GraphModule acts alike on every token; adapt the model that it was made from"
"""Why an adapter cannot act from an invocation on there."""
FUSED_DTYPES = ("float32", "float64", "float16", "bfloat16")
"""Of base weights that are computed with their adapter as one operation."""


def obstacle_to_fusing(site: Site, are_runs: bool, per_call: bool, dtype: str) -> str:
    """Return why base and adapter of an adapted site are not computed as one operation; "" where they are.

    Args:
        site: what is adapted.
        are_runs: whether the rows of each adapted part lie next to each other.
        per_call: whether each call of the site has an adapter of its own.
        dtype: of the base weight.
    """
    if site.op != "linear":
        reason = f"{site.op} goes"
    elif site.read or site.parameter:
        reason = "a weight that is read goes"
    elif not are_runs:
        reason = "slices of rows that do not adjoin go"
    elif per_call:
        reason = "an adapter for each call goes"
    elif dtype not in FUSED_DTYPES:
        reason = f"a base of {dtype} goes"
    else:
        return ""
    return f"{reason} operation by operation"


@dataclass(frozen=True, slots=True)
class PlannedSite:
    """A site and what will happen to it."""

    site: Site
    decision: Decision
    reason: str
    rule: str | None = None
    lora: LoRAConfig | None = None
    slices: Slices | None = None
    per_call: bool = False
    """Whether each call of the site has an adapter of its own."""
    passes: tuple[str, ...] = ()
    """What makes it cheaper to train, as far as it is known before: "fuse", "stack", "recompute"; "loss" of the layer
    that the model says makes its logits, where that name is given and only a loss turns out to read them."""
    backend: Backend = "module"
    backend_reason: str = ""
    """Why this backend, when it is not the graph."""

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def op(self) -> str:
        return self.site.op

    @property
    def shape(self) -> tuple[int, ...]:
        return self.site.shape

    @property
    def calls(self) -> int | None:
        return self.site.calls

    @property
    def not_fused(self) -> str:
        """Why base and adapter of an adapted site are not computed as one operation; "" where they are."""
        if self.decision != "adapt" or self.lora is None:
            return ""
        parts = () if self.slices is None else self.slices.ranges(self.site.features[0])
        return obstacle_to_fusing(self.site, all(map(are_neighbours, parts)), self.per_call, self.site.dtype)

    @property
    def trainable(self) -> int:
        """Number of parameters that are trained here: r · (in + out), DoRA's out, the bias; with LoRA-FA r · out.

        A sliced adapter has r · (in + rows) for each part, and of DoRA's lengths those of its rows; a bank of experts,
        or a site with an adapter for each call, has that many times as much, but for a factor that all experts share.
        """
        if self.lora is None:
            return 0
        out_features, in_features = self.site.features
        parts = self.slices.ranges(out_features) if self.slices is not None else (((0, out_features),),)
        rows = sum(end - first for part in parts for first, end in part)
        calls = (self.calls or 1) if self.per_call else 1
        extra = rows * self.lora.dora + out_features * (self.lora.bias and self.site.bias)
        firsts, seconds = (1 if self.lora.share == factor else self.site.bank for factor in "AB")
        of_a = 0 if self.lora.lora_fa else firsts * len(parts) * in_features
        return calls * self.lora.r * (of_a + seconds * rows) + extra


def unfit_for_dora(site: Site, lora: LoRAConfig, per_call: bool) -> str | None:
    """Return why a site cannot have the lengths of DoRA, where its adapter wants them; None if it can."""
    if lora.dora and site.is_banked:
        return "DoRA would compute the whole bank of matrices at each use of some of them; leave out `dora`"
    if lora.dora and per_call:
        return "DoRA and an adapter for each call are not combined; leave out one"
    return None


def unfit_for_init(site: Site, lora: LoRAConfig, sliced: bool, per_call: bool) -> str | None:
    """Return why the first values of an adapter cannot be made at a site as its `init` wants; None if they can."""
    if lora.init in FRESH:
        return None
    if site.op in (*CONVOLUTIONS, "embedding") or site.is_banked or sliced or per_call:
        return f"init {lora.init} is for one whole matrix, not for {_not_whole(site, sliced, per_call)}"
    if lora.dora and lora.init != "eva":
        return f"init {lora.init} and DoRA are not combined; leave out one"
    if lora.scaling <= 0:
        return f"init {lora.init} needs a scaling above 0, not {lora.scaling:g}"
    if lora.init in FROM_INPUTS and (site.op != "linear" or site.parameter or site.read):
        return f"init {lora.init} is for layers that are called, whose inputs show; code reads this weight"
    least, needed = min(site.features), ranks_needed(lora.init, lora.r)
    if needed > least:
        return f"init {lora.init} needs {needed} singular values for r={lora.r}, its weight has {least}"
    return None


def unfit_for_invocation(site: Site, lora: LoRAConfig) -> str | None:
    """Return why an adapter cannot act from an invocation on at a site; None if it can, or acts on every token."""
    if not lora.invocation:
        return None
    if site.op != "linear" or site.parameter or site.is_banked:
        return f"an adapter with an invocation is for linear layers, which see tokens; not for {site.op}"
    if site.read:
        return "an adapter with an invocation is for layers that are called; code reads this weight for all tokens"
    return None


def _not_whole(site: Site, sliced: bool, per_call: bool) -> str:
    if sliced or per_call:
        return "slices" if sliced else "an adapter for each call"
    return "a bank of matrices" if site.is_banked else site.op


@dataclass(frozen=True, slots=True)
class TrainedModule:
    """A module that is trained whole and saved with the adapter (rules' `train:`)."""

    path: str
    parameters: int
    pattern: str


@dataclass(frozen=True, slots=True)
class TrainedRows:
    """Rows of a weight that are trained alone and saved with an adapter (rules' `tokens:`)."""

    weight: str
    """Dotted name of the parameter."""
    ids: tuple[int, ...]
    """Which rows, in ascending order."""
    parameters: int
    """How many are trained for it; 0 where the rows are those of another weight."""
    adapter: str
    pattern: str
    """Where it comes from."""
    tied_to: str = ""
    """Name of the weight whose rows these are, where it is tied to one."""


def trained_whole(site: Site, trained: Iterable[TrainedModule]) -> PlannedSite | None:
    """Return the planned site of a weight in a module that is trained whole; None for any other weight."""
    for module in trained:
        if any(f"{path}.".startswith(f"{module.path}.") for path in site.paths):
            return PlannedSite(site, "train", train_reason(module.pattern))
    return None


def train_reason(pattern: str) -> str:
    """Return why a site is trained whole: the pattern under `train:` that matches a module around it."""
    return f"under train: {pattern}"


@dataclass(frozen=True, slots=True)
class PlannedPass:
    """What an optimisation that is done by its name only would do to a block, or why not."""

    name: str
    """As `optimise` takes it; "labels" is what "liveness" and "loss" do together to a last block."""
    reason: str = ""
    """Why it would not be done; empty if it would."""


@dataclass(frozen=True, slots=True)
class PlannedRegion:
    """A submodule whose forward will run as a guarded graph, or the reason why it will not."""

    path: str
    backend: Backend
    reason: str = ""
    by_name: tuple[PlannedPass, ...] = ()
    """What finds nothing in it to do, such as no attention, is left out."""


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """A weight of which rows can be trained alone: that of an embedding."""

    paths: tuple[str, ...]
    """Every name of its module, the first one first."""
    weight: str
    """Dotted name of the parameter."""
    rows: int
    width: int
    tied: tuple[str, ...] = ()
    """Names of other parameters that are the same weight."""
    padding: int | None = None
    """The row that the embedding gives no gradient."""
    refusal: str = ""
    """Why rows of it cannot be trained alone; empty if they can."""

    @property
    def path(self) -> str:
        return self.paths[0]


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a model has: everything that `decide` needs to know of it."""

    model: str
    """The model's class name."""
    sites: tuple[Site, ...]
    modules: tuple[tuple[str, int], ...]
    """(path, number of parameters in it), for every module."""
    total: int
    """Number of parameters of the model."""
    in_graph: frozenset[str] | None = None
    """Paths of the sites that the model's own graph computes; None of a model that has none."""
    tables: tuple[EmbeddingTable, ...] = ()
    biases: tuple[tuple[str, int], ...] = ()
    """(name, number of parameters) of every parameter called `bias`; of a tied one the number stands once."""

    @property
    def fingerprint(self) -> str:
        """A hash over what a plan relies on (paths, operations, shapes of sites), not over values or dtypes."""
        digest = hashlib.sha256()
        for site in self.sites:
            digest.update(f"{site.path}\0{site.op}\0{site.shape}\n".encode(errors="surrogatepass"))
        return digest.hexdigest()[:16]


def rank_notes(planned: Iterable[PlannedSite]) -> list[str]:
    """Return a note for each rule whose rank is above a matrix's smaller side: it saves nothing there."""
    paths: dict[tuple[str | None, int, int], list[str]] = {}
    for site in planned:
        if site.lora is not None and site.lora.r > min(site.site.features):
            paths.setdefault((site.rule, site.lora.r, min(site.site.features)), []).append(site.path)
    return [
        f"{listing(sites, 3)}: r = {r} is above min(in, out) = {smaller}; full fine-tuning would need fewer parameters"
        for (_, r, smaller), sites in paths.items()
    ]


def dead_notes(planned: Iterable[PlannedSite]) -> list[str]:
    """Return a note on the adapted sites that no example input uses, if there are any."""
    dead = [site.path for site in planned if site.decision == "adapt" and site.calls == 0]
    return [f"{listing(dead, 3)}: {DEAD}, so their adapters get no gradient from such inputs"] if dead else []
