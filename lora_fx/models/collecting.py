"""Garbage is looked for later: while many small objects are made that all stay, there is none among them."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collected_later() -> Iterator[None]:
    """Return a context without collections of garbage in this process, if there were any; after it they go on.

    An adapter is some forty small objects at each site.  What they set off is a look through all objects of the
    process, which in one that has imported transformers takes longer than making them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
