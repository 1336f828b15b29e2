"""What trainers call on models that save themselves: on an adapted one it writes the adapter, or is refused.

`save_pretrained` (of transformers, diffusers, huggingface_hub's mixin) would write base and factors side by side, and
`from_pretrained` would read the base and pass over the factors; `resize_token_embeddings` would put new layers in the
place of adapted ones.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import is_adapted, with_values
from lora_fx.errors import RefusedError
from lora_fx.files.adapter.write import by_one_process, save
from lora_fx.files.atomic import write_files
from lora_fx.files.values import canonical_safetensors
from lora_fx.models.fsdp import resharded
from lora_fx.models.shards import is_sharded, sharded_names, whole
from lora_fx.models.swap import MADE_BY, Swapped, swap
from lora_fx.models.tensors import borrowed
from lora_fx.models.walking import modules_of
from lora_fx.tuned.build import frozen_factors, held

_WEIGHTS = "model.safetensors"
_CONFIGURATION = "config.json"
_REFUSED = {
    "add_adapter": "lora_fx.add(model, rules, adapter=NAME) puts one beside it",
    "load_adapter": "lora_fx.add(model, directory, adapter=NAME) puts one beside it",
    "delete_adapter": "lora_fx.drop(model, name); lora_fx.remove(model) gives the base",
    "set_adapter": "lora_fx.use(model, name)",
    "enable_adapters": "they are on; lora_fx.disabled(model) is a context without them",
    "disable_adapters": "lora_fx.disabled(model) is a context without them",
    "active_adapters": "lora_fx.list_adapters(model) says what is used",
    "enable_peft_hotswap": "lora_fx.swap(model, directory, adapter=NAME) gives one other values",
    "get_adapter_state_dict": "lora_fx.save(model, directory) writes the adapter",
    "load_lora_adapter": "lora_fx.add(model, directory, adapter=NAME) puts one beside it",
    "save_lora_adapter": "lora_fx.export(model, path, 'diffusers') writes what diffusers reads",
    "set_adapters": "lora_fx.use(model, names) or lora_fx.use(model, {name: weight})",
    "delete_adapters": "lora_fx.drop(model, name); lora_fx.remove(model) gives the base",
    "fuse_lora": "lora_fx.merge(model) gives a plain model",
    "unload_lora": "lora_fx.remove(model) gives the base",
    "enable_lora": "they are on; lora_fx.disabled(model) is a context without them",
    "disable_lora": "lora_fx.disabled(model) is a context without them",
}
"""Methods of transformers and diffusers for adapters of PEFT, and what to do instead."""


def take_over(twin: nn.Module) -> nn.Module:
    """Return the adapted twin itself; what is called on it, or on a model inside of it, is right or refused.

    Graphs come after it: they hold for the classes that they were made of.
    """
    modules = modules_of(twin)
    kinds = {kind for kind in set(map(type, modules)) if _has(kind, "save_pretrained")}
    for module in modules if kinds else ():
        kind = type(module)
        if kind in kinds and is_adapted(module):
            refused = tuple(name for name in _REFUSED if _has(kind, name))
            swap(module, pretrained(refused, module is twin, _has(kind, "get_input_embeddings")))
    return twin


def _has(kind: type, name: str) -> bool:
    return callable(getattr(kind, name, None))


class AdaptedPart(Swapped, nn.Module):
    """Mixin for a model inside of an adapted one."""

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Raise RefusedError."""
        raise RefusedError(
            "save_pretrained of a part of an adapted model would write a base that is read without its adapters",
            advice="lora_fx.save the whole model, or save_pretrained the part of lora_fx.merge(model)",
        )


class AdaptedModel(Swapped, nn.Module):
    """Mixin for an adapted model that can save itself."""

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Write the adapter, a transformers model's as `write_checkpoint` does; the model stays unchanged.

        Args:
            save_directory: as of the class.
            is_main_process: False writes nothing.
            state_dict: values to write in the place of the model's own, as trainers gather them from shards.  Without
                them every process of a model that FSDP2 shards calls this, and one of them writes.
            push_to_hub: refused.

        Raises:
            RefusedError: `push_to_hub`; or `state_dict` holds parts, which the main process would wait for alone.
            AdapterFileError: as `lora_fx.save`.
        """
        if push_to_hub:
            raise RefusedError(
                "an adapted model is not pushed while it is saved",
                advice="save it, then huggingface_hub.upload_folder; lora_fx.merge(model) gives a plain model to push",
            )
        parts = set(sharded_names(resharded(self)))
        if not is_main_process and (not parts or state_dict is not None):  # of those gathered others get an empty one
            return  # of shards that nobody has gathered, every process has to give its part
        wanted = {id(parameter) for parameter in held(self)}
        given = state_dict or {}
        _refuse_parts(given)
        values = {
            name: nn.Parameter(given.get(name, torch.empty(p.shape, dtype=p.dtype, device="meta")), p.requires_grad)
            for name, p in self.named_parameters(remove_duplicate=False)
            if (id(p) in wanted and name in given) or (state_dict is not None and name in parts)
        }
        with borrowed(self, values):
            write = write_checkpoint if _has(type(self), "get_input_embeddings") else save
            write(self, Path(save_directory))


def _refuse_parts(state: Mapping[str, Tensor]) -> None:
    parts = [(name, "is a DTensor") for name, tensor in state.items() if is_sharded(tensor)]
    if parts:
        raise RefusedError(
            "the state_dict holds parts of tensors, and other processes, which hold the rest, may not come by",
            parts[:8],
            "gather it (`StateDictOptions(full_state_dict=True)`), or leave it out and let every process call this",
        )


class AdaptedTokens(Swapped, nn.Module):
    """Mixin for an adapted model of transformers, or one inside of it, whose embeddings can be resized."""

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the input embeddings, resized as the class does; refused where they or the head are trained."""
        ends = (self.get_input_embeddings(), self.get_output_embeddings())  # type: ignore[operator]
        rows = ends[0]._parameters["weight"].shape[0]
        if new_num_tokens in (None, rows):
            return ends[0]  # type: ignore[no-any-return]
        mine = {id(parameter) for parameter in held(self)}
        if any(id(p) in mine or p.requires_grad for end in ends if end is not None for p in end.parameters()):
            raise RefusedError(
                "embeddings with an adapter cannot be resized: it belongs to the old ones",
                [("rows", str(rows)), ("wanted", str(new_num_tokens))],
                "resize the model, then lora_fx.apply; lora_fx.remove or lora_fx.merge give one that can be resized",
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)  # type: ignore[misc,no-any-return]


class AdaptedPretrained(AdaptedModel, AdaptedTokens):
    """Mixin for an adapted model of transformers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the class's own forward does; RefusedError for `adapter_names`."""
        if "adapter_names" in kwargs:
            raise RefusedError(
                "adapter_names chooses among adapters of PEFT, and this model has one of lora_fx",
                advice="call it without, in `with lora_fx.rows(model, names):`; None there is PEFT's '__base__'",
            )
        return super().forward(*args, **kwargs)


@functools.cache
def pretrained(refused: tuple[str, ...], whole: bool, transformer: bool) -> type:
    """Return the mixin for an adapted model.

    Args:
        refused: methods that it has, and that are refused.
        whole: whether it is the twin itself, and not a part of it.
        transformer: whether it is a model of transformers.
    """
    wholes: tuple[type, ...] = (AdaptedPretrained if transformer else AdaptedModel,)
    bases = wholes if whole else (AdaptedPart, AdaptedTokens) if transformer else (AdaptedPart,)
    body: dict[str, Any] = {name: _refusing(name) for name in refused}
    return type(bases[0].__name__, bases, {**body, MADE_BY: (pretrained, (refused, whole, transformer))})


def _refusing(name: str) -> Any:
    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise RefusedError(f"{name} handles adapters of PEFT, and this model has one of lora_fx", advice=_REFUSED[name])

    return refuse


def write_checkpoint(tuned: nn.Module, folder: Path) -> None:
    """Write the adapter in PEFT's format, and all that is not frozen as `model.safetensors`, in place of the model.

    `lora_fx.load(model, folder)` reads such a folder, and so does PEFT.  The Trainer resumes from it and loads the best
    of them at the end: it looks for the trained tensors under their own keys in `model.safetensors`, and would go on
    without a word where there is none.  `config.json` is left out, or `from_pretrained` would take the folder for a
    whole model.
    """
    save(tuned, folder)
    tensors = trained_tensors(with_values(tuned))

    def write() -> None:
        write_files({folder / _WEIGHTS: canonical_safetensors(tensors, {"format": "pt"})})
        (folder / _CONFIGURATION).unlink(missing_ok=True)

    by_one_process(tuned, write)


def trained_tensors(tuned: nn.Module) -> dict[str, Tensor]:
    """Return the entries of the state dict that training may change, each tensor once and contiguous."""
    frozen = frozen_keys(tuned)
    names: dict[int, str] = {}
    state = tuned.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if name not in frozen:
            names.setdefault(id(tensor), name)
    return {name: whole(state[name]).contiguous() for name in names.values()}


def frozen_keys(tuned: nn.Module) -> set[str]:
    """Return the keys of the parameters that require no gradient, but for A of LoRA-FA: another run draws another."""
    drawn, named = frozen_factors(tuned), tuned.named_parameters(remove_duplicate=False)
    return {name for name, p in named if not p.requires_grad and id(p) not in drawn}
