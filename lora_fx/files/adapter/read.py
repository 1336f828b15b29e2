"""Files → a checked AdapterFile.  Nothing here touches a model, and nothing is unpickled."""

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fx.errors import AdapterFileError
from lora_fx.files.adapter.configuration import Configuration, read_configuration
from lora_fx.files.adapter.folder import file_in, folder_of
from lora_fx.files.adapter.header import read_header
from lora_fx.files.adapter.names import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    SiteKeys,
    added_bias_key,
    base_key,
    begins_in,
    bias_key,
    has_end,
    magnitude_key,
    module_to_save,
    owner_of,
    pattern_name,
    site_keys,
    split_bias_key,
    split_factor_key,
    split_rows_key,
    stems_in,
)
from lora_fx.files.adapter.noted import Header
from lora_fx.files.adapter.site import SavedSite
from lora_fx.files.adapter.tensorfile import as_here, tensors_in
from lora_fx.files.fingerprint import sample_values
from lora_fx.models.together import surely_finite
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


_NARROW = {torch.float32, torch.float16, torch.bfloat16}
"""Of which no finite value is too large for float32."""
_LOOSE = re.compile(r"(?!.*(?:lora_|base_layer|original_module|modules_to_save)).+\.(?:weight|bias)", re.DOTALL)


def read_adapters(directory: str | os.PathLike[str]) -> list[AdapterFile]:
    """Return the adapter of a directory, and those that were saved with it, checked in themselves.

    Raises:
        AdapterFileError: missing, truncated, damaged, foreign or contradictory files; says which and how.
    """
    folder = folder_of(directory)
    first = _read(folder)
    return [first, *(_read(folder, name) for name in first.header.others)]


def _read(root: Path, *names: str) -> AdapterFile:
    weights, configuration = (file_in(root, *names, name) for name in (WEIGHTS_FILE, CONFIG_FILE))
    config = read_configuration(configuration)
    tensors, metadata = tensors_in(weights)
    header = read_header(weights, metadata, tensors)
    if header is None:
        tensors = as_here(weights, config, tensors)
    return _AdapterReader(root.joinpath(*names), (weights, configuration), config, tensors, header).read()


def adapter_in_memory(source: str, config: Configuration, tensors: dict[str, Tensor]) -> AdapterFile:
    """Return an adapter of PEFT's that is in no file, checked in itself; `source` is what errors call it.

    Raises:
        AdapterFileError: tensors and configuration contradict each other.
    """
    path = Path(source)
    return _AdapterReader(path, (path, path), config, as_here(path, config, tensors), None).read()


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
        if not names:
            return {}
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

    @functools.cached_property
    def _keys(self) -> dict[str, SiteKeys]:
        """The keys of each site, by its stem."""
        return {stem: site_keys(stem, self.tensors) for stem in stems_in(self.tensors)}

    def _check(self, paths: list[str]) -> None:
        facts = [fact for path in paths if not self._is_plain(path) for fact in self._site_problems(path)]
        if not paths:
            facts.append(("(file)", "has no lora_A or lora_B"))
        facts += self._row_problems()
        facts += [(key, "is of no kind that lora_fx knows") for key in self._unknown(paths)]
        facts += [(path, "is in the header but not in the file") for path in self._noted.keys() - {*paths}]
        narrow = {tensor.dtype for tensor in self.tensors.values()} <= _NARROW
        if not (narrow and self._finite):
            problems = {key: self._value_problem(key, tensor) for key, tensor in self.tensors.items()}
            facts += [(key, problem) for key, problem in problems.items() if problem is not None]
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

    def _is_plain(self, path: str) -> bool:
        """Whether a site is a product of two matrices of the rank that it should have: most are, and are asked once."""
        keys, tensors = self._keys[path], self.tensors
        A, B = tensors.get(keys.A), tensors.get(keys.B)
        if A is None or B is None or A.dim() != 2 or B.dim() != 2 or not A.numel() or not B.numel():
            return False
        if self._has_biases or self.config.use_dora or keys.magnitude in tensors or self._is_parameter(path):
            return False
        return self._lora_of_config(path).r == A.shape[0] == B.shape[1]

    @functools.cached_property
    def _has_biases(self) -> bool:
        return self.config.lora_bias or bool({key for key in self.tensors if key.endswith(".bias")})

    def _site_problems(self, path: str) -> Iterator[tuple[str, str]]:
        keys = self._keys[path][:2]
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
        known = {key for keys in self._keys.values() for key in (keys.A, keys.B, keys.base, keys.magnitude)}
        if self._has_biases:
            known |= {*map(self._bias_key, paths)}
            known |= {keys.added_bias for keys in self._keys.values() if self.config.lora_bias}
        known |= {PREFIX + name for name in self._loose} | self._biases(paths).keys()
        others = [key for key in self.tensors if key not in known and key not in self._owners]
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
        noted, keys = self._noted.get(stem), self._keys[stem]
        is_biased = self._has_biases and not self._is_parameter(stem)
        site = SavedSite(
            stem=stem,
            lora_A=self.tensors[keys.A],
            lora_B=self.tensors[keys.B],
            bias=self.tensors.get(self._bias_key(stem)) if is_biased else None,
            magnitude=self.tensors.get(keys.magnitude),
            added_bias=self.tensors.get(keys.added_bias),
            embedding=keys.embedding,
            noted=noted is not None,
            **({"path": stem, "lora": self._lora_of_config(stem)} if noted is None else noted),
        )
        if site.noted:
            self._must_agree(site)
        return site

    def _lora_of_config(self, path: str) -> LoRAConfig:
        name = pattern_name(path)
        r, alpha = self.config.rank_at(name), self.config.alpha_at(name)
        bias = self._has_biases and not {self._bias_key(path), added_bias_key(path)}.isdisjoint(self.tensors)
        lora = self._loras.get((r, alpha, bias))
        if lora is None:
            lora = self._loras[r, alpha, bias] = LoRAConfig(
                r=r,
                alpha=alpha,
                dropout=self.config.lora_dropout,
                init=self.config.init,
                rslora=self.config.use_rslora,
                dora=self.config.use_dora,
                bias=bias,
                invocation=self.config.invocation,
            )
        return lora

    @functools.cached_property
    def _loras(self) -> dict[tuple[int, float, bool], LoRAConfig]:
        """Settings that have been made: most sites have the same."""
        return {}

    @functools.cached_property
    def _agreeing(self) -> set[tuple[int, int, int]]:
        """Settings of header and configuration, by their ids, that have been found to agree."""
        return set()

    def _must_agree(self, site: SavedSite) -> None:
        """The configuration, which other tools read, must scale as the header says, and mean the base itself."""
        configured = self._lora_of_config(site.name)
        pair = id(site.lora), id(configured), site.file_ranks
        if pair in self._agreeing:  # both are kept as long as this reads
            return
        if is_moved(self.config.init):
            of_peft = [("init_lora_weights", self.config.init), ("written by save", "true")]
            raise AdapterFileError(self._weights, f"contradicts {CONFIG_FILE}, by which the base is another", of_peft)
        if site.lora.invocation != self.config.invocation:
            told = [("invocation by the header", str(list(site.lora.invocation)))]
            told += [(f"by {CONFIG_FILE}", str(list(self.config.invocation)))]
            raise AdapterFileError(self._weights, f"contradicts {CONFIG_FILE} at {site.stem}", told)
        scaling = site.lora.scaling
        if site.rank != configured.r or abs(configured.scaling - scaling) > 1e-6 * abs(scaling):
            facts = [
                ("by the header", f"r {site.rank}", f"scaling {scaling:g}"),
                (f"by {CONFIG_FILE}", f"r {configured.r}", f"scaling {configured.scaling:g}"),
            ]
            raise AdapterFileError(self._weights, f"contradicts {CONFIG_FILE} at {site.stem}", facts)
        self._agreeing.add(pair)


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


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
