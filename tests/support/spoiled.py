"""Adapters and checkpoints on disk, changed, and one reading each: read and used, or refused by an error of ours."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import os
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import lora_fx
from lora_fx.cli.models.checkpoint import checkpoint_model
from lora_fx.errors import LoraFxError
from lora_fx.files.adapter.contents import contents_of
from lora_fx.files.adapter.header import hash_of
from lora_fx.files.adapter.names import CONFIG_FILE, METADATA_KEY, WEIGHTS_FILE
from lora_fx.files.adapter.read import read_adapters
from lora_fx.files.adapter.restore import fitted
from lora_fx.files.checkpoint.basefiles import read_checkpoint
from lora_fx.files.checkpoint.sites import plan_merge
from lora_fx.models.samples import samples_for
from tests.support.merging import factors, write_adapter, write_base
from tests.support.mutation import VALUES, mutated_document
from tests.support.readings import bounded

PREFIX = "base_model.model."
NAMES = [
    "", ".", "..", "a", "a..b", "\0", "a\nb", "\ud800", "x" * 5000, "fc", "forward", "__class__", "up.weight", "_",
    f"{PREFIX}up.lora_A.weight", f"{PREFIX}.lora_A.weight", f"{PREFIX}up.base_layer.weight", f"{PREFIX}up.lora_B.bias",
    f"{PREFIX}up.lora_magnitude_vector", f"{PREFIX}wte.lora_embedding_A", f"{PREFIX}wte.token_adapter.trainable_tokens_delta",
    f"{PREFIX}head.weight", f"{PREFIX}up.base_layer.lora_A.weight", f"{PREFIX}\u202e.lora_B.weight", "__metadata__",
]  # fmt: skip
DTYPES = ["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "U16", "f32", None, 5]
SIZES = [0, 1, 2, 3, -1, 2**31, 2**63, 2**64, 10**400, 1.0, "2", None, True]
KEYS = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save", "use_dora", "use_rslora",
        "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_bias", "bias",
        "trainable_token_indices", "peft_type", "peft_version", "init_lora_weights", "fan_in_fan_out", "lora_dropout"]  # fmt: skip
SETTINGS = [
    *VALUES, "LORA", "up", ["up", "down"], {"up": 2}, {"^up$": 3}, {"(a|a)*b": 1, "(?!x).*": 2}, {"(": 1}, "(a|b)*", "all", "pissa",
    ["head"], {"wte": [0, 1]}, [0, 1], 4, 2, "0.18.0", "²", 3.4e38, 1e39, -5, 1e-320,
]  # fmt: skip


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.up, self.down, self.head = nn.Embedding(6, 4), nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.up(self.wte(ids)).tanh()))


Parts = tuple[dict[str, Any], bytes, dict[str, Any]]
"""Header, bytes of the tensors, configuration."""


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


_LOADED = 10
"""Of so many adapters that fit one is loaded, which captures the model."""


@functools.cache
def _home() -> Path:
    return Path(tempfile.mkdtemp(prefix="spoiled-"))


@functools.cache
def _model() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@functools.cache
def _adapters() -> list[Parts]:
    """Return adapters that fit the model: ours with all that is noted, and such as PEFT writes."""
    chosen: list[dict[str, Any]] = [
        {"rules": [{"match": {"name": "**"}, "lora": {"r": 2, "alpha": 6, "init": "random"}}]},
        {"rules": [{"match": {"name": "{up,down}"}, "lora": {"r": 2, "dora": True, "bias": True}}], "train": ["head"]},
        {"rules": [{"match": {"name": "up"}, "lora": {"r": 2}, "slices": {"of": ["q", "k"], "adapt": ["k"]}}]},
        {"rules": [{"match": {"name": n}, "lora": {"r": r, "adapter": n}} for n, r in (("up", 2), ("down", 3))]},
    ]
    folders = []
    for number, rules in enumerate(chosen):
        folders.append(_home() / f"ours{number}")
        lora_fx.save(lora_fx.apply(_model(), {"version": 1, **rules}), folders[-1])
    rows = {f"{PREFIX}wte.token_adapter.trainable_tokens_delta": torch.randn(2, 4)}
    peft = factors("up", 8, 4, 2) | factors("down", 4, 8, 3)
    folders.append(write_adapter(_home() / "peft", peft, r=2, rank_pattern={"down": 3}, target_modules=["up", "down"]))
    more = {"trainable_token_indices": {"wte": [1, 2]}, "target_modules": ["up"]}
    folders.append(write_adapter(_home() / "rows", factors("up", 8, 4) | rows, **more))
    return [
        (*_split((folder / WEIGHTS_FILE).read_bytes()), json.loads((folder / CONFIG_FILE).read_text()))
        for folder in folders
    ]


def _spoil_header(draw: random.Random, header: dict[str, Any]) -> None:
    names = [name for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)]
    if not names:
        return
    name = draw.choice(names)
    entry = header[name]
    what = draw.random()
    if {*entry} != {"dtype", "shape", "data_offsets"} or what < 0.2:
        entry["dtype"] = draw.choice(DTYPES)
    elif what < 0.4:
        shape = entry["shape"]
        at = draw.randrange(len(shape) + 1)
        shape[at : at + draw.randint(0, 1)] = [draw.choice(SIZES)] * draw.choice((1, 1, 1, 60))
    elif what < 0.5:
        entry["data_offsets"] = draw.choice(([0, draw.choice(SIZES)], [0], "ab", {}, list(entry["data_offsets"])[::-1]))
    elif what < 0.75:
        header[draw.choice(NAMES)] = header.pop(name)
    elif what < 0.85:
        del header[name]
    else:
        header[draw.choice((name, "__metadata__"))] = copy.deepcopy(draw.choice(VALUES))


def _spoil_noted(draw: random.Random, header: dict[str, Any], body: bytes) -> None:
    """Change what lora_fx has noted, under a hash that is right, so that its reader sees it."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get(METADATA_KEY), str):
        return
    try:
        text = metadata[METADATA_KEY]
        text = mutated_document(draw, json.loads(text), text)
        content = json.loads(text)
        content.pop("sha256", None)
        text = json.dumps(content | {"sha256": hash_of(content, _tensors(header, body))}, separators=(",", ":"))
    except Exception:  # what cannot be hashed, or is no JSON by now, goes as it is
        pass
    metadata[METADATA_KEY] = text


def _tensors(header: dict[str, Any], body: bytes) -> dict[str, torch.Tensor]:
    path = _home() / "hashed.safetensors"
    path.write_bytes(_joined(header, body))
    return load_file(path)


def _joined(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + body


def _spoil_values(draw: random.Random, body: bytes) -> bytes:
    at = draw.randrange(len(body) // 4) * 4
    return body[:at] + draw.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\x01")) + body[at + 4 :]


def _spoil_bytes(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content) + 1)
    new = draw.choice((b"", b"", draw.randbytes(3), b"\xff" * 8))
    return content[:at] + new + (b"" if draw.random() < 0.3 else content[at + draw.randint(0, 9) :])


def _odd_file(draw: random.Random, path: Path) -> None:
    path.unlink(missing_ok=True)
    what = draw.choice(("none", "directory", "pipe", "link to nowhere", "device", "itself"))
    if what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what != "none":
        path.symlink_to({"link to nowhere": "nowhere", "device": "/dev/zero", "itself": path.name}[what])


def _write(draw: random.Random, folder: Path, header: dict[str, Any], body: bytes, config: str) -> None:
    files = {WEIGHTS_FILE: _joined(header, body), CONFIG_FILE: config.encode("utf-8", "surrogatepass")}
    for name, content in files.items():
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif os.path.lexists(path):
            path.unlink()
        path.write_bytes(_spoil_bytes(draw, content) if draw.random() < 0.07 else content)
        if draw.random() < 0.01:
            _odd_file(draw, path)


def adapter_case(seed: int) -> bool:
    """Whether a changed adapter is read; the model that it is given stays as it is, whatever becomes of it."""
    draw = random.Random(seed)
    header, body, config = copy.deepcopy(draw.choice(_adapters()))
    text = json.dumps(config)
    for _ in range(draw.choice((1, 1, 2, 3))):
        what = draw.random()
        if what < 0.35:
            _spoil_header(draw, header)
        elif what < 0.6:
            _spoil_noted(draw, header, body)
        elif what < 0.7:
            body = _spoil_values(draw, body)
        elif what < 0.9:
            config[draw.choice(KEYS)] = copy.deepcopy(draw.choice(SETTINGS))
            text = json.dumps(config)
        else:
            text = mutated_document(draw, config, text)
    folder = _home() / "adapter"
    folder.mkdir(exist_ok=True)
    _write(draw, folder, header, body, text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _tried(lambda: _shown(folder))
        if not _tried(lambda: fitted(folder, _model(), samples_for(_model(), None))):
            return False
        return seed % _LOADED != 0 or _tried(lambda: _loaded(folder))


def _shown(folder: Path) -> None:
    contents = contents_of(folder)
    assert str(contents)
    assert contents.to_json()


def _tried(read: Callable[[], object]) -> bool:
    try:
        read()
    except LoraFxError as error:
        bounded(error)
        return False
    return True


@functools.cache
def _digest(model: Small) -> str:
    return _state(model)


def _state(model: Small) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in model.state_dict().values())).hexdigest()


def _loaded(folder: Path) -> None:
    model = _model()
    before = _digest(model)
    try:
        tuned = lora_fx.load(model, folder)
        assert all(bool(torch.isfinite(p).all()) for p in lora_fx.parameters(tuned))
        assert all(math.isfinite(torch.tensor(s.scaling, dtype=torch.float32)) for s in lora_fx.deltas(tuned).sites)
    finally:
        assert _state(model) == before


# -- checkpoints


@functools.cache
def _checkpoint() -> tuple[Path, dict[str, str], dict[str, Any], list[Any]]:
    state = {name: tensor.clone() for name, tensor in Small().state_dict().items()}
    head = {name: state.pop(name) for name in ("wte.weight", "head.weight")}
    config = {"vocab_size": 6, "tie_word_embeddings": True, "architectures": ["X"], "text": {"vocab_size": 6}}
    folder = write_base(_home() / "base", head, state, config=config)
    adapter = read_adapters(write_adapter(_home() / "fitting", factors("up", 8, 4) | factors("head", 3, 4)))
    texts = {name: (folder / name).read_text() for name in ("model.safetensors.index.json", "config.json")}
    shards = {path.name: _split(path.read_bytes()) for path in folder.glob("*.safetensors")}
    return folder, texts, shards, adapter


def checkpoint_case(seed: int) -> bool:
    """Whether a merge into a changed checkpoint is planned, or its names are read as a model's."""
    draw = random.Random(seed)
    folder, texts, shards, adapter = _checkpoint()
    for name, text in texts.items():
        changed = mutated_document(draw, json.loads(text), text) if draw.random() < 0.6 else text
        (folder / name).write_bytes(changed.encode("utf-8", "surrogatepass"))
    for name, (header, body) in shards.items():
        header = copy.deepcopy(header)
        if draw.random() < 0.4:
            _spoil_header(draw, header)
        (folder / name).write_bytes(_joined(header, body))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        named = _tried(lambda: checkpoint_model(str(folder / "model.safetensors.index.json")))
        return _tried(lambda: plan_merge(read_checkpoint(folder), adapter, None)) or named
