"""Work that nobody needs is not done: tensors whose rows are computed when they are asked for.

sources   what such rows come from: `take(rows)` and `whole()`
rows      the tensor itself
rowwise   the operations through which it stays so
"""

from lora_fx.liveness import rowwise

rowwise.install()
