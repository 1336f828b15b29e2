"""Adapters that act from an invocation on (aLoRA): on which tokens of a call that is.

An adapter with an invocation acts from the last occurrence of these tokens on; before it, and in rows without it, the
base alone does.  Where that is shows in the ids that a model is called with (`tuned/invoking.py`), and not in a layer's
input; so a call's tokens are a part of what its thread uses.

Source: Greenewald et al. 2025, arXiv:2504.12397, §3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_fx.errors import RefusedError

OFFSETS = "alora_offsets"
"""Argument of an adapted model and of its `generate`, as of PEFT's: where adapters act, counted from the end."""
NEVER = 1 << 40
"""Where an adapter begins to act in a row without its invocation: behind every token."""


def last_occurrences(ids: Tensor, invocation: tuple[int, ...], mask: object = None) -> Tensor:
    """Return where a sequence occurs in each row for the last time: the place of its first token, else NEVER.

    >>> last_occurrences(torch.tensor([[7, 5, 7, 5], [7, 7, 7, 7]]), (7, 5)).tolist() == [2, NEVER]
    True

    Args:
        ids: of tokens, [batch, tokens].
        invocation: one or more ids.
        mask: an attention mask for these tokens, or for more before them: padding has the ids of others, and is none.
    """
    width = len(invocation)
    if ids.shape[1] < width:
        return ids.new_full(ids.shape[:1], NEVER, dtype=torch.long)
    wanted = torch.tensor(invocation, dtype=ids.dtype, device=ids.device)
    there = (ids.unfold(1, width, 1) == wanted).all(-1)
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == len(ids):
        real = torch.ones_like(ids, dtype=torch.bool)
        length = min(ids.shape[1], mask.shape[1])
        real[:, ids.shape[1] - length :] = mask[:, mask.shape[1] - length :].to(ids.device) != 0
        there &= real.unfold(1, width, 1).all(-1)
    places = torch.arange(there.shape[1], device=ids.device)
    last = torch.where(there, places, -1).amax(1)
    return torch.where(last < 0, NEVER, last)


def begun_unseen(known: Tensor, invocation: tuple[int, ...], before: int, unknown: int) -> Tensor:
    """Return in which rows a sequence may have begun in tokens that nobody has seen, and ends in those after them.

    Args:
        known: ids of tokens, [batch, tokens]; `unknown` where there are none.
        invocation: one or more ids.
        before: how many of these tokens an earlier call had.
        unknown: what stands for an id that is not known.
    """
    width = len(invocation)
    if known.shape[1] < width:
        return torch.zeros(len(known), dtype=torch.bool, device=known.device)
    wanted, windows = torch.tensor(invocation, dtype=known.dtype, device=known.device), known.unfold(1, width, 1)
    blank = windows == unknown
    ends = torch.arange(windows.shape[1], device=known.device) + width > before
    return (((windows == wanted) | blank).all(-1) & blank.any(-1) & ends).any(1)


class TokensSeen:
    """Inputs of adapted layers in a run, token by token."""

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, list[tuple[torch.Size, Tensor]]] = {}
        """For each layer, call by call: the shape, and sums over the features of each token, [batch, tokens, 2]."""

    def note(self, layer: nn.Module, x: Tensor) -> None:
        """Note an input of a layer."""
        entries = x.detach().flatten(2) if x.dim() > 2 else x.detach().reshape(1, 1, -1)
        features = entries.float().nan_to_num(0.0, 0.0, 0.0)
        weights = torch.randn((features.shape[-1], 2), generator=torch.Generator().manual_seed(0))
        self.inputs.setdefault(layer, []).append((x.shape, features @ weights.to(features.device)))


@dataclass(slots=True, eq=False)
class Tokens:
    """On which tokens of one call of a model adapters with an invocation act."""

    starts: dict[str, Tensor] = field(default_factory=dict)
    """Of each such adapter: the first token of each row on which it acts, [batch]; it may lie before the call's."""
    batch: int = 0
    length: int = 0
    """Tokens of each row in this call."""
    kept: int = 0
    """How many of the last ones the call asks logits of, if it says so: a head's input has these alone."""
    everywhere: bool = False
    """Instead of all that: each adapter acts on every token, as where graphs are compared with the forward."""
    seen: TokensSeen | None = None
    """While it is looked whether layers see the tokens in their order: what has been seen."""
    _masks: dict[tuple[str, int, int, torch.device], Tensor] = field(default_factory=dict)

    def fits(self, shape: torch.Size) -> bool:
        """Whether an input of this shape can have the call's tokens, or the last ones: [batch, tokens, ...]."""
        return len(shape) > 2 and shape[0] == self.batch and shape[1] in {self.length, self.kept}

    def mask(self, name: str, x: Tensor, path: str, rows: Sequence[str | None] = ()) -> Tensor:
        """Return where an adapter acts on a layer's input, [batch, tokens, 1, …]: in its own `rows`, if they are given.

        Raises:
            RefusedError: the input does not have the call's tokens, or there are other rows.
        """
        if rows and len(rows) != self.batch:
            raise RefusedError(
                f"adapters are given for {len(rows)} rows, and the call has {self.batch}",
                [(path, f"'{name}' acts from its invocation on")],
                "give a name, or None, for each row of the batch",
            )
        if not self.fits(x.shape):
            raise RefusedError(
                f"which tokens of a layer's input are those from the invocation of '{name}' on cannot be seen",
                [(path, f"its input is {list(x.shape)}, the call's tokens are [{self.batch}, {self.length}]")],
                "keep this site out of the rules of an adapter with an invocation",
            )
        key = (name, x.shape[1], x.dim(), x.device)
        if key not in self._masks:
            places = torch.arange(self.length - x.shape[1], self.length, device=x.device)
            acts = places >= self.starts[name].to(x.device).unsqueeze(1)
            self._masks[key] = acts.view(*acts.shape, *(1 for _ in x.shape[2:]))
        if not rows:
            return self._masks[key]
        own = torch.tensor([row == name for row in rows], device=x.device)
        return self._masks[key] & own.view(-1, *(1 for _ in x.shape[1:]))


EVERYWHERE = Tokens(everywhere=True)


def unknown_tokens(path: str, invocations: Mapping[str, tuple[int, ...]]) -> RefusedError:
    """Return the error for a layer of which nobody knows which tokens it sees."""
    return RefusedError(
        "an adapter acts from an invocation on, and which tokens this layer sees is not known",
        [(path, f"'{name}' has the invocation {list(tokens)}") for name, tokens in invocations.items()],
        "call the adapted model itself with ids of tokens, not a part of it",
    )


def refuse_reading(invoked: Sequence[tuple[str, str]]) -> None:
    """Raise RefusedError for weights that code reads: (path, adapter) of those that act from an invocation on."""
    if invoked:
        facts = [(path, f"'{name}' acts from its invocation on") for path, name in invoked]
        advice = "keep these sites out of the rules of an adapter with an invocation"
        raise RefusedError("code reads an adapted weight itself, for every token", facts, advice)
