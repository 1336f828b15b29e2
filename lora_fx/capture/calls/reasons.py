"""Why something cannot be captured."""


class Untraceable(BaseException):
    """A forward cannot be captured; the text is the reason.

    Not an Exception: a forward's own `except Exception` must not swallow it and continue on another branch.
    """


def reason_of(error: BaseException) -> str:
    """Return one short line of an error's text."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text[:160] if isinstance(error, Untraceable) else f"{type(error).__name__}: {text[:160]}"
