"""hf:ORG/NAME@REVISION: a model of the Hugging Face hub, from its cache on this machine or from the network.

Of a model without weights config.json is fetched and nothing else; with weights, safetensors beside it.  No code and no
pickle is.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_fx.cli.models.pretrained import NEEDED, ModelSpecError, check_configuration
from lora_fx.errors import MergeError
from lora_fx.files.checkpoint.basefiles import weight_map
from lora_fx.text import columns, count, listing, nearest, visible

_NAME = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[\w][\w./-]*", re.ASCII)
_CONFIG, _WHOLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_BESIDE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model by its name on a hub."""

    name: str
    revision: str
    """A branch, a tag or a commit."""

    def __str__(self) -> str:
        return self.name if self.revision == "main" else f"{self.name}@{self.revision}"


def directory_of(given: str, weights: bool) -> str:
    """Return the directory that is meant behind `hf:`: a directory as it is, else the files of a name of the hub.

    Args:
        given: a path, or a name with an organisation or without, and with a revision or without.
        weights: whether weights are wanted too.

    Raises:
        ModelSpecError: the name cannot be fetched: what was tried, what is in the cache, what to do; or its
            configuration names code, before any weights are fetched.
    """
    name, _, revision = given.partition("@")
    is_name = _NAME.fullmatch(name) and (not revision or _REVISION.fullmatch(revision))
    if os.path.lexists(given) or not is_name or given.endswith("@"):
        return given
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelSpecError(f"{given} is no directory; as a name of the hub it {NEEDED}") from error
    model = HubModel(name, revision or "main")
    config = Path(_fetched(huggingface_hub, model, _CONFIG))
    check_configuration(config)
    if weights:
        _fetch_weights(huggingface_hub, HubModel(name, config.parent.name), model)
    return str(config.parent)


def _fetch_weights(hub: Any, at_commit: HubModel, model: HubModel) -> None:
    """Fetch the safetensors of a model, all of the commit whose configuration was read."""
    with contextlib.suppress(ModelSpecError):  # many models have none
        _fetched(hub, at_commit, _BESIDE)
    try:
        _fetched(hub, at_commit, _WHOLE)
        return
    except ModelSpecError as alone:
        try:
            index = Path(_fetched(hub, at_commit, _INDEX))
        except ModelSpecError:
            raise alone from None
    try:
        shards = sorted({*weight_map(index).values()})
    except MergeError as error:
        raise ModelSpecError(f"{model}: {error}") from error
    for shard in shards:
        _fetched(hub, at_commit, shard)


def _fetched(hub: Any, model: HubModel, file: str) -> str:
    """Return the path of a file of a model in the cache; it is downloaded where it is not there yet.

    Raises:
        ModelSpecError: it cannot be.
    """
    try:
        path: str = hub.hf_hub_download(model.name, file, revision=model.revision)
        return path
    except Exception as error:  # of the network, the disk, the hub, and what each brings along
        raise ModelSpecError(_trouble(hub, model, file, error)) from error


def _trouble(hub: Any, model: HubModel, file: str, error: Exception) -> str:
    """Return what was tried, why it failed, what is in the cache, and what to do."""
    why, advice = _reason(hub, model, file, error)
    tried = f"{file} of {model.name}, revision {model.revision}, at {hub.constants.ENDPOINT}"
    facts = columns([("tried", tried), ("in the cache", f"{_cached(hub, model)} ({hub.constants.HF_HUB_CACHE})")])
    return f"{model} is no directory here, and {why}\n{facts}\n  {advice}"


def _reason(hub: Any, model: HubModel, file: str, error: Exception) -> tuple[str, str]:
    kinds, login = hub.errors, "log in (hf auth login, or HF_TOKEN)"
    elsewhere = f"download it where there is a network: hf download {model.name} --revision {model.revision}"
    if isinstance(error, kinds.GatedRepoError):
        return "the hub lets only some users have it", f"ask for access on its page, then {login}"
    if isinstance(error, kinds.RepositoryNotFoundError):
        return "the hub has no such model, or it is private", f"see how it is spelt; for a private one {login}"
    if isinstance(error, kinds.RevisionNotFoundError):
        return f"the hub has no revision {model.revision} of it", "give a branch, a tag or a commit behind the @"
    if isinstance(error, kinds.LocalEntryNotFoundError) and hub.constants.HF_HUB_OFFLINE:
        return "its file is not in the cache, and HF_HUB_OFFLINE is set", f"unset HF_HUB_OFFLINE, or {elsewhere}"
    if isinstance(error, kinds.LocalEntryNotFoundError):
        return "the hub cannot be reached", f"give a directory, or {elsewhere}"
    if isinstance(error, kinds.EntryNotFoundError):
        return f"the model of that name has no {file}", "only models of transformers with safetensors can be read so"
    if isinstance(error, kinds.HFValidationError):
        return "it is no name of a model on the hub either", "write hf:DIRECTORY or hf:ORG/NAME@REVISION"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"cannot be fetched: {type(error).__name__}: {visible(first)[:200]}", "give a directory, or try again"


def _cached(hub: Any, model: HubModel) -> str:
    """Return what the cache has of a model, or which other models it has."""
    try:
        found = hub.scan_cache_dir(hub.constants.HF_HUB_CACHE)
    except (hub.errors.CacheNotFound, OSError, ValueError):
        return "nothing"
    models = {repo.repo_id: repo for repo in found.repos if repo.repo_type == "model"}
    if model.name not in models:
        near = nearest(model.name, models)
        return f"not this one; {listing(near)}" if near else f"not this one, of {count(len(models), 'model')}"
    revisions = [
        f"{'/'.join(sorted(revision.refs)) or revision.commit_hash[:12]} with {listing(sorted(_names(revision)), 4)}"
        for revision in sorted(models[model.name].revisions, key=lambda revision: revision.commit_hash)
    ]
    return f"of it {'; '.join(revisions)}" if revisions else "of it nothing"


def _names(revision: Any) -> set[str]:
    return {str(file.file_name) for file in revision.files}
