"""PEFT itself, which is an extra."""

from typing import Any


def peft_library(asked_by: str) -> Any:
    """Return the package `peft`.

    Raises:
        ImportError: it is not installed; says what needs it.
    """
    try:
        import peft
        import peft.tuners.tuners_utils
    except ImportError as error:
        raise ImportError(f"lora_fx.{asked_by} needs PEFT: pip install 'lora-fx[export]'") from error
    return peft
