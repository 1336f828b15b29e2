"""hf:DIRECTORY: a model of transformers from a directory of the machine; no code that it names is fetched or run."""

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lora_fx.errors import LoraFxError, LoraFxWarning
from lora_fx.sources.document import read_json
from lora_fx.sources.regular import UnreadableError, is_regular
from lora_fx.text import columns, listing

_MOST_BYTES = 16 * 1024 * 1024
"""Of a configuration."""
NEEDED = "needs transformers: pip install 'lora-fx[hf]'"


class ModelSpecError(LoraFxError):
    """MODEL does not lead to a model."""


def from_transformers(directory: str, weights: bool) -> nn.Module:
    """Return a model of the class that a directory's configuration names; `AutoModel`'s where it names none.

    Args:
        directory: with config.json, and with the weights if they are wanted.
        weights: with values; without them the configuration is enough.

    Raises:
        ModelSpecError: there is no such configuration, transformers is not installed or cannot make the model, or the
            configuration names code that would run: `auto_map`, or an implementation that is fetched from a hub.
    """
    file = Path(directory, "config.json")
    if not is_regular(file):
        raise ModelSpecError(f"{file} does not exist; hf: takes a directory, or ORG/NAME of the hub")
    try:
        import transformers
    except ImportError as error:
        raise ModelSpecError(f"hf: {NEEDED}") from error
    check_configuration(file)
    if weights and Path(directory, "adapter_config.json").exists():
        why = "transformers would load the base that its adapter_config.json names, and the adapter"
        raise ModelSpecError(f"{directory} holds an adapter: {why}\n  give the directory of the base alone")
    try:
        with _offline():
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            _look_at_codes(file, config, weights)
            kind = _class_of(config, transformers)
            if kind is not None:
                return _with_weights(kind, directory) if weights else kind(config)
            bare: Any = transformers.AutoModel
            if weights:
                return _with_weights(bare, directory, trust_remote_code=False)
            made: nn.Module = bare.from_config(config, trust_remote_code=False)
            return made
    except LoraFxError:
        raise
    except Exception as error:  # a configuration that transformers does not understand fails in any way
        text = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {text[0][:300] if text else ''}"
        raise ModelSpecError(f"{directory}: transformers cannot make this model: {what}") from error


def check_configuration(file: Path) -> None:
    """Raise a ModelSpecError for a configuration that cannot be read, or that names code."""
    try:
        content = read_json(file, _MOST_BYTES)
    except UnreadableError as error:
        raise ModelSpecError(f"{file}: {error}") from error
    _refuse_code(file, content)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep transformers from the network: a configuration may name a part (a `backbone`) that it would fetch."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _refuse_code(file: Path, content: Any) -> None:
    named = list(_named_code("", content))
    if named:
        advice = "take it out if transformers has this model itself, or give file.py:factory, which builds it"
        facts = f"names code that comes from elsewhere; nothing was loaded\n{columns(named)}"
        raise ModelSpecError(f"{file}: {facts}\n  {advice}")


def _named_code(path: str, content: Any) -> Iterator[tuple[str, str]]:
    """Yield (key, why) of everything in a configuration for which transformers would fetch or run code."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        if key == "auto_map" and value:
            yield here, "names Python files that define the model"
        elif "_implementation" in str(key):
            for name in value.values() if isinstance(value, dict) else (value,):
                if isinstance(name, str) and ("/" in name or _comes_from_hub(name)):
                    yield here, f"{name[:60]!r} is a kernel that is fetched from a hub"
        else:
            yield from _named_code(here, value)


def _look_at_codes(file: Path, config: Any, weights: bool) -> None:
    """Refuse a model whose linears nothing adapts; warn where one without values has plain ones in place of codes."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    name = str(getattr(method, "value", method))
    if name in _NOT_ADAPTED:
        raise ModelSpecError(
            f"{file}: its linears are codes of {name}, which {_NOT_ADAPTED[name]} reads: what its kernels do with "
            "them, and whether gradients pass, has not been run\n  give the directory of the model before it was "
            "quantised, or dequantise it with the library that has quantised it"
        )
    if method is not None and not weights:
        warnings.warn(
            f"{file}: its linears are codes of {name}; without values they are shown, and counted, as plain ones",
            LoraFxWarning,
            stacklevel=2,
        )


_NOT_ADAPTED = {"gptq": "gptqmodel", "awq": "gptqmodel"}
"""Ways of quantising whose layers are refused, and the library that has them."""


def _comes_from_hub(implementation: str) -> bool:
    """Whether transformers (5.23) would fetch a kernel for this name: flash attention that is not installed."""
    installed, fetches = (importlib.util.find_spec(name) is not None for name in ("flash_attn", "kernels"))
    return "flash" in implementation and fetches and not installed


def _class_of(config: Any, transformers: Any) -> Any:
    """Return the class of models that the configuration names, or None: a name leads to nothing else."""
    for name in config.architectures or ():
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    return None


def _with_weights(loader: Any, directory: str, **options: Any) -> nn.Module:
    model: nn.Module
    model, loading = loader.from_pretrained(directory, local_files_only=True, output_loading_info=True, **options)
    if loading["missing_keys"]:
        missing = listing(sorted(loading["missing_keys"]))
        raise ModelSpecError(
            f"{directory} lacks {missing}: from_pretrained makes up random values for them; "
            "where the model should not have them, give file.py:factory, which builds it without"
        )
    return model
