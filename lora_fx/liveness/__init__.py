"""Work that nobody needs is not done: tensors whose rows are computed when they are asked for.

sources   what such rows come from: `take(rows)` and `whole()`
rows      the tensor itself
rowwise   the operations through which it stays so
head      logits, which a linear makes of rows
crossentropy  their loss, chunk by chunk
"""

from lora_fx.liveness import crossentropy, rowwise

rowwise.install()
crossentropy.install()
