"""Variants of PEFT's whose files hold factors in another form, or more than two: put together, they are plain LoRA.

BD-LoRA (`use_bdlora`): with n blocks, A [r, in / n] stands for [r, in], and B [out, r / n] for [out, r], with zeros
beside the blocks of the diagonal.  Which of a layer's two, PEFT tells by texts that are anywhere in its path.

KaSA (`kasa_config`, arXiv:2412.06071): `lora_diag` [r] stands between the factors, B diag(d) A.  (What else PEFT does,
it does to the base: `rules.inits` calls it "kasa".)
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_fx.errors import AdapterFileError
from lora_fx.files.adapter.configuration import Configuration
from lora_fx.files.adapter.names import factor_key, split_factor_key, stems_in


def as_plain_lora(tensors: dict[str, Tensor], config: Configuration, source: str) -> dict[str, Tensor]:
    """Return the tensors of a file of PEFT's with factors as plain LoRA has them; others as they are.

    Raises:
        AdapterFileError: factors that do not fit what the configuration says of them.
    """
    if config.blocks is not None:
        tensors = _with_whole_factors(tensors, config, source)
    return _without_diagonals(tensors, source) if config.kasa else tensors


def _with_whole_factors(tensors: Mapping[str, Tensor], config: Configuration, source: str) -> dict[str, Tensor]:
    blocks = config.blocks
    assert blocks is not None
    factors = [(key, *parts) for key in tensors if (parts := split_factor_key(key)) is not None]
    meant = [key for key, path, factor in factors if blocks.holds(path, factor)]
    wrong = [
        (key, f"has shape {list(tensors[key].shape)}, and {blocks.number} blocks by use_bdlora")
        for key in meant
        if tensors[key].dim() != 2 or tensors[key].shape[0] % blocks.number
    ]
    if wrong:
        raise AdapterFileError(source, "has factors that are no blocks of a diagonal", wrong)
    return {**tensors, **{key: _on_diagonal(tensors[key].chunk(blocks.number)) for key in meant}}


def _on_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole


def _without_diagonals(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    rest, wrong = dict(tensors), []
    for stem in stems_in(tensors):
        key = factor_key(stem, "lora_A")
        A, diagonal = rest.get(key), rest.pop(factor_key(stem, "lora_diag").removesuffix(".weight"), None)
        if A is None or diagonal is None or diagonal.shape != A.shape[:1]:
            found = "is missing" if diagonal is None else f"has shape {list(diagonal.shape)}"
            wrong.append((f"{stem}.lora_diag", found))
        else:
            rest[key] = diagonal.unsqueeze(1) * A
    if wrong:
        raise AdapterFileError(source, "has no diagonal of KaSA between two factors", wrong)
    return rest
