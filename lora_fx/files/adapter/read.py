"""Files → a checked AdapterFile.  Nothing here touches a model, and nothing is unpickled."""

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lora_fx.errors import AdapterFileError, MergeError
from lora_fx.files.adapter.configuration import Configuration, read_configuration
from lora_fx.files.adapter.folder import file_in
from lora_fx.files.adapter.header import read_header
from lora_fx.files.adapter.names import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    added_bias_key,
    base_key,
    begins_in,
    bias_key,
    factor_key,
    factor_keys,
    has_end,
    is_copied_bias,
    is_of_training,
    magnitude_key,
    module_to_save,
    owner_of,
    pattern_name,
    split_bias_key,
    split_factor_key,
    split_rows_key,
    stems_in,
)
from lora_fx.files.adapter.noted import Header
from lora_fx.files.adapter.site import SavedSite
from lora_fx.files.fingerprint import sample_values
from lora_fx.files.safetensors import read_raw
from lora_fx.files.values import DTYPES
from lora_fx.models.together import surely_finite
from lora_fx.models.wrappers import without_wrappers
from lora_fx.rules.inits import is_moved
from lora_fx.rules.ruleset import LoRAConfig


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """One adapter, read and checked in itself."""

    folder: Path
    files: tuple[Path, Path]
    """Its weights and its configuration."""
    config: Configuration
    header: Header
    """What lora_fx noted; for a file of PEFT's what the tensors tell of it."""
    sites: tuple[SavedSite, ...]
    modules: dict[str, Tensor]
    """Tensors of the modules that are trained whole, by their name in the model."""
    claimed: tuple[str, ...]
    """Ends of paths: PEFT saves every module that has one of them, so the file must hold all of its tensors."""
    loose: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the base that PEFT has written along, by their name in the model: they count where they differ."""
    rows: dict[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)
    """Rows of embeddings that are trained alone: which, and their values, by the path of the embedding."""
    ties: dict[str, str] = field(default_factory=dict)
    """Names of weights that have the rows of another one, by their own name."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """Biases that are trained beside those of sites and of whole modules, by their name in the model."""

    @property
    def is_foreign(self) -> bool:
        """Whether lora_fx did not write it."""
        return not any(site.noted for site in self.sites)


_READ = {*DTYPES, "C64", "F8_E4M3", "F8_E5M2"}
_LOOSE = re.compile(r"(?!.*(?:lora_|base_layer|original_module|modules_to_save)).+\.(?:weight|bias)", re.DOTALL)


def read_adapters(directory: str | os.PathLike[str]) -> list[AdapterFile]:
    """Return the adapter of a directory, and those that were saved with it, checked in themselves.

    Raises:
        AdapterFileError: missing, truncated, damaged, foreign or contradictory files; says which and how.
    """
    folder = Path(directory)
    first = _read(folder)
    return [first, *(_read(folder, name) for name in first.header.others)]


def _read(root: Path, *names: str) -> AdapterFile:
    weights, configuration = (file_in(root, *names, name) for name in (WEIGHTS_FILE, CONFIG_FILE))
    config = read_configuration(configuration)
    tensors, metadata = _read_tensors(weights)
    header = read_header(weights, metadata, tensors)
    if header is None:
        tensors = _without_wrappers(weights, config, tensors)
    return _AdapterReader(root.joinpath(*names), (weights, configuration), config, tensors, header).read()


def adapter_in_memory(source: str, config: Configuration, tensors: dict[str, Tensor]) -> AdapterFile:
    """Return an adapter of PEFT's that is in no file, checked in itself; `source` is what errors call it.

    Raises:
        AdapterFileError: tensors and configuration contradict each other.
    """
    path = Path(source)
    return _AdapterReader(path, (path, path), config, _without_wrappers(path, config, tensors), None).read()


def _without_wrappers(path: Path, config: Configuration, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what counts of PEFT's tensors, of a model in wrappers as torch.compile and FSDP put them around layers."""
    left_out = [key for key in tensors if is_of_training(key) or (config.bias == "all" and is_copied_bias(key))]
    tensors = {key: tensor for key, tensor in tensors.items() if key not in left_out}
    names = {key: without_wrappers(key) for key in tensors}
    if len(set(names.values())) < len(names):
        twice = [(key, name) for key, name in names.items() if key != name and name in tensors]
        raise AdapterFileError(str(path), "has a tensor twice, inside of a wrapper and outside", twice)
    return {names[key]: tensor for key, tensor in tensors.items()}


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not os.path.lexists(path):
        old = path.with_name("adapter_model.bin")
        advice = (
            "it has only adapter_model.bin, a pickle, which is not read: convert it with PEFT" if old.is_file() else ""
        )
        raise AdapterFileError(str(path), "does not exist", advice=advice)
    try:
        raw = read_raw(path)  # whatever the header says is checked before the library sees it
    except MergeError as error:
        raise AdapterFileError(str(path), f"cannot be read: {_after(path, error)}") from error
    other = [(name, f"is of {entry.dtype}") for name, entry in raw.tensors.items() if entry.dtype not in _READ]
    if other:
        raise AdapterFileError(str(path), "has values that lora_fx does not read", other)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: _wide(file.get_tensor(name)) for name in raw.tensors}, raw.metadata
    except Exception as error:  # of the library's own, whatever it takes exception to
        raise AdapterFileError(
            str(path), f"cannot be read: {error}", advice="the file is cut off or damaged; copy it again"
        ) from error


def _after(path: Path, error: MergeError) -> str:
    """Return what an error says behind the path."""
    return str(error).removeprefix(f"{path}: ")


@dataclass(frozen=True)  # without slots: what is asked again and again is kept
class _AdapterReader:
    """Turns tensors and configuration into sites, checking one against the other."""

    folder: Path
    files: tuple[Path, Path]
    config: Configuration
    tensors: dict[str, Tensor]
    header: Header | None

    def read(self) -> AdapterFile:
        paths = stems_in(self.tensors)
        self._check(paths)
        trained = self._trained()
        header = self.header
        if header is None:
            owners = tuple(dict.fromkeys(trained.values()))
            header = Header("default", trained=owners, base=self._base(paths))
        return AdapterFile(
            folder=self.folder,
            files=self.files,
            config=self.config,
            header=header,
            sites=tuple(self._site(path) for path in paths),
            modules={key.removeprefix(PREFIX): self.tensors[key] for key in trained},
            claimed=self.config.modules_to_save if self.header is None else (),
            loose=self._loose if self.header is None else {},
            rows=self._rows,
            ties={} if self.header is None else self.header.tied,
            biases={name: self.tensors[key] for key, name in self._biases(paths).items()},
        )

    @functools.cached_property
    def _noted(self) -> dict[str, dict[str, Any]]:
        return {} if self.header is None else self.header.sites

    def _bias_key(self, stem: str) -> str:
        """Return the key of a site's own bias: the calls of a module, which have an adapter each, share it."""
        return bias_key(self._noted.get(stem, {}).get("path", stem))

    @property
    def _weights(self) -> str:
        return str(self.files[0])

    @functools.cached_property
    def _owners(self) -> dict[str, str]:
        """Paths of the modules trained whole, by the key of each tensor that belongs to one."""
        names = self.config.modules_to_save
        owners = {key: module_to_save(key.removeprefix(PREFIX), names) for key in self.tensors}
        return {key: owner for key, owner in owners.items() if owner and split_factor_key(key) is None}

    def _trained(self) -> dict[str, str]:
        """Return the owners that were trained; others are there because PEFT looks at the ends of names."""
        if self.header is None:
            return self._owners
        trained = frozenset(self.header.trained)
        return {key: owner for key, owner in self._owners.items() if begins_in(key.removeprefix(PREFIX), trained)}

    def _base(self, paths: list[str]) -> dict[str, list[float] | None]:
        """Return a few values of the base weights in the file: PEFT would put them in place of the model's."""
        return {path: sample_values(self.tensors[base_key(path)]) for path in paths if base_key(path) in self.tensors}

    def _check(self, paths: list[str]) -> None:
        facts = [fact for path in paths for fact in self._site_problems(path)]
        if not paths:
            facts.append(("(file)", "has no lora_A or lora_B"))
        facts += self._row_problems()
        facts += [(key, "is of no kind that lora_fx knows") for key in self._unknown(paths)]
        facts += [(path, "is in the header but not in the file") for path in self._noted.keys() - {*paths}]
        facts += [
            (key, problem) for key, tensor in self.tensors.items() if (problem := self._value_problem(key, tensor))
        ]
        if facts:
            raise AdapterFileError(self._weights, "is not a usable adapter", facts)

    def _row_problems(self) -> Iterator[tuple[str, str]]:
        if self.config.token_rows and not self._rows:
            yield "trainable_token_indices", f"{CONFIG_FILE} names rows, and the file has none"
        for path, (ids, _) in self._rows.items():
            if len({*ids}) < len(ids):
                yield "trainable_token_indices", f"names a row of {path} twice"
        for name, source in {} if self.header is None else self.header.tied.items():
            if source.removesuffix(".weight") not in self._rows:
                yield name, f"is tied to {source}, of which the file has no rows"

    def _site_problems(self, path: str) -> Iterator[tuple[str, str]]:
        keys = factor_keys(path, self.tensors)
        missing = [key for key in keys if key not in self.tensors]
        if missing:
            yield missing[0], "is missing"
            return
        lora_a, lora_b = (self.tensors[key] for key in keys)
        if not (lora_a.numel() and lora_b.numel()) or not _multiply(lora_a, lora_b):
            yield path, f"lora_A {list(lora_a.shape)} and lora_B {list(lora_b.shape)} do not multiply"
        elif self.config.use_dora != (magnitude_key(path) in self.tensors):
            yield magnitude_key(path), "is missing" if self.config.use_dora else "is there without use_dora"
        elif not self._is_parameter(path) and (rank := self.config.rank_at(pattern_name(path))) != lora_a.shape[0]:
            yield path, f"has rank {lora_a.shape[0]}, {CONFIG_FILE} says {rank}"
        is_flipped = self._is_parameter(path) and self._noted.get(path, {}).get("layout") == "in_out"
        yield from self._vector_problems(path, lora_a.shape[1:2] if is_flipped else lora_b.shape)

    def _value_problem(self, key: str, tensor: Tensor) -> str | None:
        """Return why the values cannot be what they are read as."""
        if not tensor.is_floating_point() and key not in self._owners:
            return f"is of {str(tensor.dtype).removeprefix('torch.')}, not of a floating point dtype"
        if not self._finite and not _is_finite(tensor):
            return "has NaN or infinite values"
        # PEFT and most models hold factors in float32
        overflows = tensor.dtype == torch.float64 and not _is_finite(tensor.float())
        return "has values that are too large for float32" if overflows else None

    @functools.cached_property
    def _finite(self) -> bool:
        """Whether all values are known to be finite, without a look at each tensor."""
        return surely_finite(self.tensors.values())

    @functools.cached_property
    def _owners_of_parameters(self) -> frozenset[str]:
        return frozenset(name.rpartition(".")[0] for name in self.config.target_parameters)

    def _is_parameter(self, stem: str) -> bool:
        """Whether what stands in the keys is a raw parameter, whose rank depends on the model."""
        if stem in self._noted:
            return bool(self._noted[stem].get("parameter"))
        return "" in self._owners_of_parameters or has_end(owner_of(stem), self._owners_of_parameters)

    def _vector_problems(self, path: str, outputs: torch.Size) -> Iterator[tuple[str, str]]:
        if self.config.lora_bias and added_bias_key(path) not in self.tensors:
            yield added_bias_key(path), "is missing"
        for key in (self._bias_key(path), added_bias_key(path), magnitude_key(path)):
            vector = self.tensors.get(key)
            # a convolution's lengths are [1, out, 1…]
            if vector is not None and vector.shape not in (outputs[:1], (1, *outputs[:1], *outputs[2:])):
                yield key, f"has shape {list(vector.shape)}, not {list(outputs[:1])}"

    def _unknown(self, paths: list[str]) -> list[str]:
        known = {key for path in paths for key in factor_keys(path, self.tensors)}
        known |= {key(path) for path in paths for key in (base_key, self._bias_key, magnitude_key)}
        known |= {added_bias_key(path) for path in paths if self.config.lora_bias}
        known |= {PREFIX + name for name in self._loose} | self._biases(paths).keys()
        others = (key for key in self.tensors if key not in known and key not in self._owners)
        return [key for key in others if split_rows_key(key) not in self._rows]

    @functools.cached_property
    def _rows(self) -> dict[str, tuple[tuple[int, ...], Tensor]]:
        """Return the rows of embeddings that are trained alone, as many as the configuration says."""
        named = {path: tensor for key, tensor in self.tensors.items() if (path := split_rows_key(key))}
        by_path = self.header is not None
        rows = {path: (self.config.rows_at(path, by_path), tensor) for path, tensor in named.items()}
        fitting = {path: pair for path, pair in rows.items() if pair[1].shape[:1] == (len(pair[0]),)}
        return {path: _in_order(ids, tensor) for path, (ids, tensor) in fitting.items()}

    def _biases(self, paths: list[str]) -> dict[str, str]:
        """Return the names in the model of biases that belong to no site and no whole module, by their keys."""
        if self.config.bias != "all":
            return {}
        own = {self._bias_key(path) for path in paths if not self._is_parameter(path)} | self._trained().keys()
        named = {key: name for key in self.tensors if (name := split_bias_key(key)) is not None}
        return {key: name for key, name in named.items() if key not in own}

    @functools.cached_property
    def _loose(self) -> dict[str, Tensor]:
        """Return what PEFT has written of the base along with the adapter: embeddings and heads, as they are."""
        names = {
            key: key.removeprefix(PREFIX) for key in self.tensors if key.startswith(PREFIX) and key not in self._owners
        }
        biases = self._biases(stems_in(self.tensors))
        return {name: self.tensors[key] for key, name in names.items() if _LOOSE.fullmatch(name) and key not in biases}

    def _site(self, stem: str) -> SavedSite:
        known = self._noted.get(stem, {"path": stem, "lora": self._lora_of_config(stem)})
        first, second = factor_keys(stem, self.tensors)
        site = SavedSite(
            stem=stem,
            lora_A=self.tensors[first],
            lora_B=self.tensors[second],
            bias=None if self._is_parameter(stem) else self.tensors.get(self._bias_key(stem)),
            magnitude=self.tensors.get(magnitude_key(stem)),
            added_bias=self.tensors.get(added_bias_key(stem)),
            embedding=first == factor_key(stem, "lora_embedding_A"),
            noted=stem in self._noted,
            **known,
        )
        if site.noted:
            self._must_agree(site)
        return site

    def _lora_of_config(self, path: str) -> LoRAConfig:
        return LoRAConfig(
            r=self.config.rank_at(pattern_name(path)),
            alpha=self.config.alpha_at(pattern_name(path)),
            dropout=self.config.lora_dropout,
            init=self.config.init,
            rslora=self.config.use_rslora,
            dora=self.config.use_dora,
            bias=self._bias_key(path) in self.tensors or added_bias_key(path) in self.tensors,
            invocation=self.config.invocation,
        )

    def _must_agree(self, site: SavedSite) -> None:
        """The configuration, which other tools read, must scale as the header says, and mean the base itself."""
        if is_moved(self.config.init):
            of_peft = [("init_lora_weights", self.config.init), ("written by save", "true")]
            raise AdapterFileError(self._weights, f"contradicts {CONFIG_FILE}, by which the base is another", of_peft)
        if site.lora.invocation != self.config.invocation:
            told = [("invocation by the header", str(list(site.lora.invocation)))]
            told += [(f"by {CONFIG_FILE}", str(list(self.config.invocation)))]
            raise AdapterFileError(self._weights, f"contradicts {CONFIG_FILE} at {site.stem}", told)
        scaling, configured = site.lora.scaling, self._lora_of_config(site.name)
        if site.rank != configured.r or abs(configured.scaling - scaling) > 1e-6 * abs(scaling):
            facts = [
                ("by the header", f"r {site.rank}", f"scaling {scaling:g}"),
                (f"by {CONFIG_FILE}", f"r {configured.r}", f"scaling {configured.scaling:g}"),
            ]
            raise AdapterFileError(self._weights, f"contradicts {CONFIG_FILE} at {site.stem}", facts)


def _in_order(ids: tuple[int, ...], rows: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Return rows in the ascending order of their ids."""
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return tuple(ids[at] for at in order), rows[order]


def _multiply(lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether two tensors can be the factors of one matrix, or of one convolution."""
    if lora_a.dim() != lora_b.dim() or lora_a.dim() not in (2, 3, 4, 5):
        return False
    if lora_a.dim() == 2:
        return lora_a.shape[0] == lora_b.shape[1]
    ones = all(size == 1 for size in lora_b.shape[2:])
    return ones and lora_b.shape[1] > 0 and lora_a.shape[0] % lora_b.shape[1] == 0


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor of 8-bit floats in float32, which holds each of their values; any other as it is."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
