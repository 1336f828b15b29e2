"""Which sums in a graph are LoRAs: W x + scaling · B A x on one x, or W + scaling · B A."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import fx

from lora_fx.remerging.algebra.affine import addends, broadcasts, input_of, linear_parameters
from lora_fx.remerging.algebra.chains import Affine, Chains, MatrixChain, WeightPart
from lora_fx.remerging.algebra.convolutions import Patches
from lora_fx.remerging.algebra.lookalikes import LINEARS, cone_of, looks_like_lora, made_with_product, path_of
from lora_fx.remerging.algebra.operations import IDENTITY, NotLinear
from lora_fx.remerging.algebra.reading import GraphReading

_PASSES_ON = (IDENTITY, "view", "getitem", "slice", "narrow", "chunk", "split")


@dataclass(frozen=True, slots=True, eq=False)
class Addend:
    """One value of a sum of any shape: the node, the addition that reads it, and its sign or scaling in the whole."""

    node: fx.Node
    reader: fx.Node
    number: float


@dataclass(frozen=True, slots=True, eq=False)
class LinearAddend:
    """An addend that is x · W + bias, or some of its columns, and nothing else."""

    node: fx.Node
    """What the sum adds."""
    reader: fx.Node
    """The addition that reads it."""
    use: fx.Node
    """The linear."""
    x: fx.Node
    value: Affine
    part: WeightPart
    bias: WeightPart | None
    width: int
    """Columns of x."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraFold:
    """A product that goes into a weight."""

    use: fx.Node
    """The linear; or the node that adds the product to the weight itself."""
    part: WeightPart
    bias: WeightPart | None
    chains: Chains
    constants: Chains
    delta: fx.Node | None
    """The product's value, which the sum will no longer have; None where the product is added to the weight."""
    reader: fx.Node | None
    number: float
    """What the delta is multiplied by in the sum."""
    x: fx.Node | None
    width: int
    cone: frozenset[fx.Node]
    """All that computes the product."""
    base: frozenset[fx.Node]
    """All that computes the linear alone, from x to the sum."""
    end: fx.Node | None
    """The addition that reads the linear alone."""
    rows: object = None
    """The dimensions in front of its columns, or the Patches of a convolution."""

    @property
    def signature(self) -> object:
        """Equal for folds that change a weight by the same."""
        chains = frozenset((chain.key, chain.coefficient) for chain in (*self.chains, *self.constants))
        return (self.part.start, self.part.stop, chains)

    @property
    def factors(self) -> frozenset[str]:
        return frozenset().union(*(chain.names for chain in (*self.chains, *self.constants)))

    @property
    def path(self) -> str:
        return path_of(self.part)


@dataclass(slots=True)
class Findings:
    """The folds of a graph, and what is left alone: (path, reason)."""

    folds: list[LoraFold] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def find_folds(read: GraphReading) -> Findings:
    """Return every LoRA of the graph by its structure, and what looks like one; nothing is changed.

    In the graph of a layer that computes `linear(x) + 2 * (x @ A @ B)`, A [in, r], B [r, out]::

        add = linear + mul          one sum with the addends linear and mul, which `sums` yields
        linear → LinearAddend       a base: x · Wᵀ + bias and nothing else, W stored as [out, in]
        mul → x · 2 A B             as `GraphReading.affine` reads it: one chain, 2.0 · A · B, of rank r < in or out
        → LoraFold                  part = all rows of W, chains = (2.0 · A · B,), delta = mul, reader = add

    `add` becomes `linear`, and W becomes W + 2 (A B)ᵀ.  If the sum has `linear(y)` instead, the product is left alone,
    because "its input is x, the linear's is y".
    """
    findings = Findings()
    for node in _weight_sums(read):
        _read_weight(read, node, findings)
    for parts in sums(read):
        _read_sum(read, parts, findings)
    return findings


# -- sums of values


def sums(read: GraphReading) -> Iterator[list[Addend]]:
    """Yield the addends of every sum that is not part of a larger one."""
    seen: set[fx.Node] = set()
    for node in reversed(list(read.graph.nodes)):
        if node not in seen and _is_sum(read, node):
            parts: list[Addend] = []
            _flatten(read, node, 1.0, parts, seen)
            yield parts


def _is_sum(read: GraphReading, node: fx.Node) -> bool:
    call = read.calls.get(node)
    if call is None or call.op not in ("add", "sub") or read.is_constant(node):
        return False
    try:
        return len(list(addends(read, call))) == 2
    except NotLinear:
        return False


def _flatten(read: GraphReading, node: fx.Node, number: float, parts: list[Addend], seen: set[fx.Node]) -> None:
    seen.add(node)
    for addend, own in addends(read, read.calls[node]):
        inner = addend
        while read.is_read_once(inner) and _is_same(read, inner):
            inner = read.given(read.calls[inner])
        if _is_sum(read, inner) and read.is_read_once(inner):
            _flatten(read, inner, number * own, parts, seen)
        else:
            parts.append(Addend(addend, node, number * own))


def _is_same(read: GraphReading, node: fx.Node) -> bool:
    call = read.calls.get(node)
    return call is not None and call.op == IDENTITY and not read.is_constant(node)


def _read_sum(read: GraphReading, parts: list[Addend], findings: Findings) -> None:
    bases = [base for addend in parts if addend.number == 1.0 and (base := _base_of(read, addend)) is not None]
    for addend in parts:
        own = _linear_below(read, addend.node)
        _read_addend(read, addend, [base for base in bases if base.use is not own], findings)


def _read_addend(read: GraphReading, addend: Addend, bases: list[LinearAddend], findings: Findings) -> None:
    reasons: dict[str, str] = {}
    for base in bases:
        try:
            findings.folds.append(_fold(read, addend, base))
        except NotLinear as reason:
            rows, width = base.value.rows, base.width
            columns = rows.channels(width) if isinstance(rows, Patches) else width
            if looks_like_lora(read, addend.node, base.x, (columns, base.value.width), reason):
                reasons[path_of(base.part)] = reason.reason
        else:
            return
    findings.left.update(reasons)


def _fold(read: GraphReading, addend: Addend, base: LinearAddend) -> LoraFold:
    """Return the addend as a fold into the base.

    Raises:
        NotLinear: it is not one; says why.
    """
    node, width = addend.node, base.width
    value = read.affine(node, base.x, width).scaled(addend.number)
    if (value.width, value.rows) != (base.value.width, base.value.rows):
        raise NotLinear(node, broadcasts(base.value, value))
    check_product(value.linear, node)
    if value.constant and base.bias is None:
        raise NotLinear(node, "it adds a bias to a linear that has none")
    cone, base_cone = cone_of(read, node, base.x), cone_of(read, base.node, base.x)
    return LoraFold(
        base.use, base.part, base.bias, value.linear, value.constant, node, addend.reader, addend.number, base.x,
        width, cone, base_cone, base.reader, value.rows,
    )  # fmt: skip


def check_product(chains: Iterable[MatrixChain], node: fx.Node) -> None:
    """Raise NotLinear unless there is a chain and all chains are products through few dimensions."""
    chains = tuple(chains)
    if not chains:
        raise NotLinear(node, "it does not depend on the linear's input")
    for chain in chains:
        if len(chain.factors) < 2:
            raise NotLinear(node, "it is not a product of two matrices")
        if not chain.is_low_rank:
            first, last = chain.factors[0].tensor.shape[0], chain.columns
            raise NotLinear(node, f"its inner dimension {chain.rank} is not smaller than {first} or {last}")


# -- the linear in a sum


def _linear_below(read: GraphReading, node: fx.Node) -> fx.Node | None:
    """Return the linear whose value, or columns of it, the node passes on."""
    while True:
        call = read.calls.get(node)
        if call is None or read.is_constant(node):
            return None
        if call.op in LINEARS:
            return node
        if call.op not in _PASSES_ON or not isinstance(call.get("input"), fx.Node):
            return None
        node = read.given(call)


def _base_of(read: GraphReading, addend: Addend) -> LinearAddend | None:
    """Return the addend as a linear's value, if it is nothing else."""
    node, use = addend.node, _linear_below(read, addend.node)
    if use is None:
        return None
    call = read.calls[use]
    try:
        weight, _ = linear_parameters(read, call)
        x = input_of(read, call)
        value = read.affine(node, x, weight.shape[0])
    except NotLinear:
        return None
    parts, bias = list(value.parts()), [chain.part for chain in value.constant]
    if len(parts) != 1 or len(value.linear) != 1 or len(bias) > 1 or None in bias:
        return None
    return LinearAddend(node, addend.reader, use, x, value, parts[0][1], bias[0] if bias else None, weight.shape[0])


# -- products that are added to the weight itself


def _weight_sums(read: GraphReading) -> Iterator[fx.Node]:
    """Yield the constants that something which depends on an input, or the output, reads."""
    for node in read.graph.nodes:
        if not node.op.startswith("call_") or not node.all_input_nodes or not read.is_constant(node):
            continue
        if any(reader.op == "output" or not read.is_constant(reader) for reader in read.readers(node)):
            yield node


def _read_weight(read: GraphReading, node: fx.Node, findings: Findings) -> None:
    try:
        value = read.constant(node)
    except NotLinear as reason:
        name = made_with_product(read, node)
        if name is not None:
            findings.left[name] = reason.reason
        return
    assert value is not None
    value = value.flattened()
    if value is None:
        return
    whole = [chain for chain in value.chains if chain.part is not None]
    others = tuple(chain for chain in value.chains if chain.part is None)
    if len(whole) != 1 or not others:
        return
    part = whole[0].part
    assert part is not None
    try:
        check_product(others, node)
    except NotLinear:
        return
    if whole[0].factors[0].tensor.numel() != read.tensors[part.name].numel():
        return
    cone = cone_of(read, node, None)
    findings.folds.append(
        LoraFold(node, part, None, others, (), None, None, 1.0, None, value.shape[0], cone, cone, None)
    )
