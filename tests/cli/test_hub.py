"""hf:ORG/NAME@REVISION: models of the hub, from a cache as huggingface_hub lays it out; there is no network here."""

from __future__ import annotations

import json

import pytest
import torch

from lora_fx.cli.models.hub import directory_of
from lora_fx.cli.models.pretrained import ModelSpecError
from lora_fx.cli.models.spec import load_model
from tests.cli.test_hf_directories import BERT
from tests.support.clitools import run

transformers = pytest.importorskip("transformers")
hub = pytest.importorskip("huggingface_hub")
COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return a cache with one model: its configuration at `main`, and at an older commit that a tag names."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    put(folder, "main", COMMIT, "config.json", json.dumps(BERT).encode())
    put(folder, "v1", OLDER, "config.json", json.dumps({**BERT, "hidden_size": 16}).encode())
    return folder


def put(folder, ref: str, commit: str, file: str, content: bytes, name: str = "models--someone--tiny") -> None:
    """Lay a file out as huggingface_hub does: the content among the blobs, a link to it in the snapshot."""
    model = folder / name
    blob = model / "blobs" / f"{abs(hash(content)):040x}"
    link = model / "snapshots" / commit / file
    for path in (model / "refs" / ref, blob, link):
        path.parent.mkdir(parents=True, exist_ok=True)
    (model / "refs" / ref).write_text(commit)
    blob.write_bytes(content)
    link.symlink_to(blob)


def test_layout_of_the_cache_is_that_of_huggingface_hub(cache):
    assert hub.try_to_load_from_cache("someone/tiny", "config.json") is not None
    assert [repo.repo_id for repo in hub.scan_cache_dir(cache).repos] == ["someone/tiny"]


@pytest.mark.parametrize(("spec", "width"), [("someone/tiny", 8), ("someone/tiny@main", 8), ("someone/tiny@v1", 16),
                                             (f"someone/tiny@{OLDER}", 16)])  # fmt: skip
def test_configuration_of_a_revision_is_read_from_the_cache(cache, spec, width):
    model, _ = load_model(f"hf:{spec}")
    assert type(model) is transformers.BertModel
    assert model.config.hidden_size == width
    assert model.embeddings.word_embeddings.weight.is_meta


def test_every_verb_with_a_model_takes_a_name_of_the_hub(cache):
    planned = run("plan", "hf:someone/tiny", "attention")
    assert planned.exit_code == 0, planned.output
    assert run("init", "hf:someone/tiny@v1").stdout.startswith("## Rules for BertModel")


def test_weights_are_those_of_the_same_commit(cache, tmp_path):
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig.from_dict(BERT))
    model.save_pretrained(tmp_path / "saved")
    for file in ("config.json", "model.safetensors"):
        put(cache, "weighty", "c" * 40, file, (tmp_path / "saved" / file).read_bytes())
    loaded, _ = load_model("hf:someone/tiny@weighty", weights=True)
    same = loaded.state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in model.state_dict().items())


def test_shards_of_an_index_are_fetched_and_no_other_files(cache, tmp_path, monkeypatch):
    model = transformers.BertModel(transformers.BertConfig.from_dict(BERT))
    model.save_pretrained(tmp_path / "saved", max_shard_size="2KB")
    shards = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(shards) > 1
    for path in (tmp_path / "saved").iterdir():
        put(cache, "sharded", "d" * 40, path.name, path.read_bytes())
    asked = []
    real = hub.hf_hub_download
    monkeypatch.setattr(
        hub, "hf_hub_download", lambda name, file, **kw: asked.append((file, kw)) or real(name, file, **kw)
    )
    load_model("hf:someone/tiny@sharded", weights=True)
    files = ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", *shards]
    assert [file for file, _ in asked] == files
    assert {kw["revision"] for _, kw in asked[1:]} == {"d" * 40}


def test_model_without_safetensors_is_refused(cache):
    with pytest.raises(ModelSpecError, match=r"model\.safetensors of someone/tiny"):
        load_model("hf:someone/tiny", weights=True)


@pytest.mark.parametrize("weights", [False, True])
def test_configuration_that_names_code_is_refused_before_weights_are_fetched(cache, weights, monkeypatch):
    content = json.dumps({**BERT, "auto_map": {"AutoModel": "modeling.Other"}}).encode()
    put(cache, "code", "e" * 40, "config.json", content)
    asked = []
    real = hub.hf_hub_download
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file, **kw: asked.append(file) or real(name, file, **kw))
    with pytest.raises(ModelSpecError, match="names code that comes from elsewhere"):
        load_model("hf:someone/tiny@code", weights=weights)
    assert asked == ["config.json"]


def test_directory_of_that_name_wins(cache, tmp_path):
    folder = tmp_path / "someone" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**BERT, "hidden_size": 4}))
    assert load_model("hf:someone/tiny")[0].config.hidden_size == 4
    (folder / "config.json").unlink()
    with pytest.raises(ModelSpecError, match=r"someone/tiny/config\.json does not exist"):
        load_model("hf:someone/tiny")


# -- what cannot be fetched


def told(spec: str) -> list[str]:
    done = run("plan", spec, "attention")
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    return done.stderr.splitlines()


def test_offline_error_says_what_was_tried_what_the_cache_has_and_what_to_do(cache):
    first, tried, cached, advice, _ = told("hf:someone/tiny@v2")
    assert (
        first
        == "lora-fx: someone/tiny@v2 is no directory here, and its file is not in the cache, and HF_HUB_OFFLINE is set"
    )
    assert tried.split() == [
        "tried",
        "config.json",
        "of",
        "someone/tiny,",
        "revision",
        "v2,",
        "at",
        hub.constants.ENDPOINT,
    ]
    assert cached == f"  in the cache  of it main with config.json; v1 with config.json ({cache})"
    assert advice.endswith("hf download someone/tiny --revision v2")


def test_offline_error_names_what_is_near_in_the_cache(cache):
    assert "not this one; someone/tiny" in told("hf:someone/tinny")[2]


def test_cache_that_is_not_there_has_nothing(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "nowhere"))
    assert "  in the cache  nothing" in told("hf:someone/tiny")[2]


def answers(status: int):
    """Return what an answer of the hub with an error is made of, for the releases of huggingface_hub that need one."""
    http = pytest.importorskip("httpx2", reason="of huggingface_hub 2")
    return http.Response(status, request=http.Request("HEAD", "https://huggingface.co/someone/tiny"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (lambda: hub.errors.GatedRepoError("gated", response=answers(403)), "the hub lets only some users have it"),
        (
            lambda: hub.errors.RepositoryNotFoundError("no", response=answers(404)),
            "has no such model, or it is private",
        ),
        (lambda: hub.errors.RevisionNotFoundError("no", response=answers(404)), "has no revision main of it"),
        (lambda: hub.errors.RemoteEntryNotFoundError("no", response=answers(404)), "has no config.json"),
        (lambda: hub.errors.LocalEntryNotFoundError("no"), "the hub cannot be reached"),
        (lambda: hub.errors.HfHubHTTPError("500 oh\nno", response=answers(500)), "HfHubHTTPError: 500 oh"),
        (lambda: ConnectionError("reset \x1b[2J"), r"ConnectionError: reset \x1b[2J"),
        (lambda: OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_every_error_of_a_download_is_told_with_what_to_do(cache, monkeypatch, error, words):
    made = error()

    def failing(*_, **__):
        raise made

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hf_hub_download", failing)
    first, tried, _, advice, *_ = told("hf:someone/tiny")
    assert words in first
    assert tried.startswith("  tried  ")
    assert advice.strip()


@pytest.mark.parametrize("given", ["a/b/c", "./x", "/x", "../x", "~/x", "a b", "a/b@", "a@b@c", "a@../b", "é", "a\0b"])
def test_what_is_no_name_is_taken_for_a_directory(cache, given, monkeypatch):
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    assert directory_of(given, weights=False) == given


def test_without_huggingface_hub_a_name_says_what_to_install(cache, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ModelSpecError, match=r"needs transformers: pip install 'lora-fx\[hf\]'"):
        directory_of("someone/tiny", weights=False)
