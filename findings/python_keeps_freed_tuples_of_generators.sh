#!/usr/bin/env bash
# Who:       CPython 3.11.7, its allocator of small objects; no package.
# What:      tuple(i for i in three) takes a tuple of ten from the list of freed ones, or a new one, cuts it to three, and
#            puts it into the list of freed tuples of three, from which nothing takes it again. So each such call holds
#            one block more, until the list of each length (up to 20) has 2,000. A full collection of garbage empties the
#            lists; the arenas that they made grow often stay, as something else lies in them.
# Expected:  a loop that keeps nothing holds no more memory after 3,000 turns than after ten.
# Seen:      blocks held after 10, 1010, 2010, 3010 turns: 0, 1000, 2000, 2000; after gc.collect(): 0 (each ± 20)
#            with tuple([i for i in three]) instead: 0 throughout
# Way out:   know it: it is bounded, some 2 MB. What measures memory asks allocators what is in use, after gc.collect().
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
python3 - <<'PYTHON'
import gc
import platform
import sys

THREE = [1, 2, 3]


def blocks(make):
    """Return how many more blocks are held after each thousand turns than after ten, and after a collection."""
    gc.collect()
    gc.disable()
    for _ in range(10):
        make()
    start = sys.getallocatedblocks()
    seen = []
    for _ in range(3):
        for _ in range(1000):
            make()
        seen.append(sys.getallocatedblocks() - start)
    gc.collect()
    gc.enable()
    return [*seen, sys.getallocatedblocks() - start]


generator, listed = blocks(lambda: tuple(i for i in THREE)), blocks(lambda: tuple([i for i in THREE]))
print("CPython", platform.python_version())
print("tuple(i for i in three)  ", generator)
print("tuple([i for i in three])", listed)
first, second, third, after = generator
steady = all(abs(count) < 30 for count in (third - second, after, *listed))
sys.exit(not (900 < first < 1100 and 1900 < second < 2100 and steady))
PYTHON
