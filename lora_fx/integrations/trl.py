"""TRL's trainers with a reference: the base of the adapted model itself, and no second model.

    trainer = trainer_of(GRPOTrainer, tuned, args=GRPOConfig(beta=0.04), reward_funcs=reward, train_dataset=data)

TRL takes the reference from a `PeftModel` by switching its adapter off, and of every other model loads it once more by
its path.
"""

import contextlib
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import with_values
from lora_fx.adapters.placed import base_in, placed_in
from lora_fx.adapters.tokenrows import TokenRows
from lora_fx.adapters.trained import added_rows, are_equal
from lora_fx.errors import RefusedError
from lora_fx.models.tensors import get_tensor
from lora_fx.models.wrappers import seen_through
from lora_fx.text import listing
from lora_fx.tuned.build import record_in
from lora_fx.tuned.listing import list_adapters
from lora_fx.tuned.state import adapter_state
from lora_fx.tuned.switching import chosen_for_a_while
from lora_fx.tuned.undo import disabled, removed

Trainer = TypeVar("Trainer")
_SHARDING = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
"""Option of a trainer, and what `accelerate launch` sets for it."""


class Reference(nn.Module):
    """A model's base, or another adapter of it, to be called like the model: in eval mode and without gradients.

    It runs the adapted model itself, as `lora_fx.disabled` or `lora_fx.use` do in this thread.  It has no parameters:
    nobody trains, moves, shards or averages the model by it.  Methods of the model (`generate`) run so too.  Modules
    that it is asked for are the model's own, and the base's inside of a call alone.  `state_dict` is the reference's.
    Several threads may call it; the mode is the model's, so that none trains the model meanwhile.
    """

    def __init__(self, tuned: nn.Module, adapter: str | None) -> None:
        super().__init__()
        object.__setattr__(self, "_tuned", tuned)  # no child: its parameters are not those of the reference
        self._adapter = adapter
        self.eval()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the reference computes."""
        with self.shown(), torch.no_grad():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model computes; `__call__` has chosen its adapter."""
        return self._tuned(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_tuned" not in self.__dict__:
            return super().__getattr__(name)
        found = getattr(self.__dict__["_tuned"], name)
        return self._as_reference(found) if inspect.ismethod(found) and id(self) not in _SHOWN.get() else found

    def _as_reference(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def shown(*args: Any, **kwargs: Any) -> Any:
            with self.shown(), torch.no_grad():
                return method(*args, **kwargs)

        return shown

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Let the model be the reference, in this thread, until the block ends."""
        chosen = disabled(self._tuned) if self._adapter is None else chosen_for_a_while(self._tuned, self._adapter)
        with chosen, _in_eval_mode(self._tuned):
            _SHOWN.set((*_SHOWN.get(), id(self)))
            try:
                yield
            finally:
                left = list(_SHOWN.get())
                left.remove(id(self))
                _SHOWN.set(tuple(left))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the values that the reference computes with, by which TRL knows what it has computed before."""
        shown = removed(self._tuned) if self._adapter is None else self._tuned
        state: dict[str, Any] = shown.state_dict(*args, **kwargs)
        return state

    def extra_repr(self) -> str:
        return f"{type(self._tuned).__name__}, {self._adapter or 'its base'}"


_SHOWN: ContextVar[tuple[int, ...]] = ContextVar("lora_fx_references", default=())
"""The references, by their ids, as which this thread shows a model."""
_MODES = threading.Lock()
_IN_EVAL: dict[int, "_InEval"] = {}
"""The models that somebody shows as a reference, by their ids."""


@dataclass(slots=True)
class _InEval:
    training: list[nn.Module]
    users: int = 0


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Let a model be in eval mode until the last of those who want that has ended: threads may overlap."""
    with _MODES:
        mode = _IN_EVAL.setdefault(id(model), _InEval([module for module in model.modules() if module.training]))
        mode.users += 1
    try:
        for module in mode.training:
            module.training = False
        yield
    finally:
        with _MODES:
            mode.users -= 1
            if not mode.users:
                del _IN_EVAL[id(model)]
                for module in mode.training:
                    module.training = True


def reference(tuned: nn.Module, *, adapter: str | None = None, trained: bool = False) -> Reference:
    """Return the base of an adapted model as a model of its own, which shares all of it; the model stays unchanged.

    For trainers that take a reference, as `ref_model=` of TRL's DPOTrainer and KTOTrainer.

    Args:
        tuned: an adapted model, which is trained.
        adapter: another adapter of the model, frozen and not in use, which the reference uses in place of none: what a
            training starts from that goes on with an adapter.
        trained: that the adapter in use may have changed the model already, and its base is meant all the same.

    Raises:
        RefusedError: the model is not adapted; what is in use changes it already, so that its base is not what the
            training starts from; or the other adapter is trained or in use.
        ValueError: there is no such adapter.
    """
    tuned = seen_through(tuned)
    record_in(tuned)
    if adapter is not None:
        _check_frozen(tuned, adapter)
    elif not trained:
        _check_start(tuned)
    made = Reference(tuned, adapter)
    with made.shown():  # or what refuses it does so at the first step
        return made


def _check_start(tuned: nn.Module) -> None:
    """Raise RefusedError where what is in use has values of its own, or none that can be seen (ZeRO-3)."""
    active = [one for one in list_adapters(tuned) if one.active]
    moved = [
        (one.name, "holds no values here" if one.norm is None else f"‖ΔW‖ = {one.norm:.3g}")
        for one in active
        if one.norm != 0
    ]
    whole = with_values(tuned)
    base = base_in(placed_in(tuned))
    moved += [(name, "is trained, and not the base's") for name in base if not _is_like(whole, name, base[name])]
    names = {one.name for one in active}
    for name, adapter, rows in added_rows(whole):
        if adapter in names and not _is_like(whole, name, rows.rows, rows):
            moved.append((name, f"has {len(rows.ids)} trained rows"))
    if moved:
        raise RefusedError(
            "the adapter changes the model already: its base is not what the training starts from",
            moved,
            "lora_fx.apply(lora_fx.merge(model), rules) starts from it; reference(model, adapter=NAME) takes a frozen "
            "copy of the adapter; reference(model, trained=True) takes the base all the same",
        )


def _is_like(model: nn.Module, name: str, value: Tensor, rows: TokenRows | None = None) -> bool:
    """Whether the model's tensor of that name, or these rows of it, has the value."""
    own = get_tensor(model, name)
    return are_equal(own if own is None or rows is None else own[rows.index(own.device)], value)


def _check_frozen(tuned: nn.Module, adapter: str) -> None:
    """Raise where a name is not that of an adapter that stays as it is, ValueError where there is none."""
    mine = adapter_state(tuned, adapter).keys()
    moving = [name for name, p in tuned.named_parameters(remove_duplicate=False) if name in mine and p.requires_grad]
    facts = [(name, "requires gradients") for name in moving[:8]]
    facts += [(one.name, "is in use") for one in list_adapters(tuned) if one.name == adapter and one.active]
    if facts:
        advice = "lora_fx.use(model, OTHER), and requires_grad_(False) for its parameters"
        raise RefusedError(f"adapter '{adapter}' would move with the training: it is no reference", facts, advice)


def trainer_of(kind: Callable[..., Trainer], tuned: nn.Module, *, args: Any, **options: Any) -> Trainer:
    """Return a trainer of TRL's whose reference is the base of the adapted model itself; no other base is loaded.

    For DPOTrainer, KTOTrainer, OnlineDPOTrainer, GRPOTrainer, RLOOTrainer, and what is derived from them.  In every
    call of the reference the model computes what `reference` says; losses are those that TRL has with a new adapter of
    PEFT's.

    Args:
        kind: the class of the trainer.
        tuned: an adapted model whose adapters have not been trained.
        args: its configuration; it stays as it is.
        options: what else the class takes, but for `model`, `ref_model` (give another one to the class itself) and
            `peft_config`.

    Raises:
        RefusedError: as `reference`; a reference that is to follow the model (`sync_ref_model`), FSDP or DeepSpeed, for
            which TRL shards the reference by itself; a class that has no reference, or has it in another way.
        TypeError: an option that has no place here.
    """
    taken = sorted({"model", "ref_model", "peft_config"} & options.keys())
    if taken:
        raise TypeError(f"trainer_of gives {kind.__name__} the model and its reference: leave out {listing(taken)}")
    _check_arguments(kind, args)
    if _is_given_one(kind):
        return kind(tuned, ref_model=reference(tuned), args=args, **options)
    beta = args.beta
    if not beta:  # no reference is asked for
        return kind(tuned, args=args, **options)
    base = reference(tuned)
    args.beta = 0.0  # else the class loads a model by its path
    try:
        trainer: Any = kind(tuned, args=args, **options)
    finally:
        args.beta = beta
    if getattr(trainer, "ref_model", base) is not None or getattr(trainer, "beta", None) != 0.0:
        raise RefusedError(f"this version of {kind.__name__} has its reference in another way")
    trainer.ref_model, trainer.beta = base, beta
    return trainer  # type: ignore[no-any-return]


def _is_given_one(kind: Callable[..., object]) -> bool:
    """Whether a class, or one that it is derived from, takes its reference as an argument."""
    kinds = [one for one in getattr(kind, "__mro__", (kind,)) if one is not object]
    return any("ref_model" in inspect.signature(one).parameters for one in kinds)


def _check_arguments(kind: Callable[..., object], args: Any) -> None:
    """Raise RefusedError for what no shared reference can be right for."""
    facts = []
    if not _is_given_one(kind) and getattr(args, "beta", None) is None:
        facts.append(("reference", f"{kind.__name__} has none: give it the model itself"))
    if getattr(args, "sync_ref_model", False):
        facts.append(("sync_ref_model", "the reference is the base, and cannot follow the model"))
    for name, variable in _SHARDING.items():
        if getattr(args, name, None) or os.environ.get(variable, "false").lower() in ("1", "true"):
            facts.append((name, f"{kind.__name__} shards a reference by itself, and this one has nothing to shard"))
    if facts:
        advice = "give the class itself ref_model=, or args.model_init_kwargs, for a second model"
        raise RefusedError(f"{kind.__name__} cannot have the model's base as its reference", facts, advice)
