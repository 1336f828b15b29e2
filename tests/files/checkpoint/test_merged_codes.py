"""Adapters merged into checkpoints of compressed-tensors: codes on the base's own scales, read by its own library."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.cli import main
from lora_fx.errors import MergeError, RefusedError
from lora_fx.files.checkpoint import coded
from tests.support.codedmodels import INT4, compress_, copied
from tests.support.merging import factors, write_adapter, write_base
from tests.support.sitekinds import randomise_

transformers = pytest.importorskip("transformers")
compressors = pytest.importorskip("compressed_tensors.compressors")
pytestmark = pytest.mark.filterwarnings("ignore:the grid cannot hold", "ignore:model.layers.0.* stay quantised")

ROOT = Path(__file__).parents[3]
IDS = torch.arange(8)[None]
RULES = {"version": 1, "rules": [{"match": {"name": ["**.q_proj", "**.down_proj"]}, "lora": {"r": 4}}]}
ASYMMETRIC = "int4, asymmetric, bfloat16"
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
KINDS: dict[str, Any] = {
    "int4": (INT4, None, torch.float32),
    ASYMMETRIC: (INT4 | {"symmetric": False}, None, torch.bfloat16),
    "int8 packed": (INT8, None, torch.float32),
    "int8 with rounded inputs": (INT8, TOKENS, torch.float32),
}
SITES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


def made(weights: dict[str, Any], inputs: dict[str, Any] | None, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Return a quantised model, and what has compressed it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    compress_(model := transformers.LlamaForCausalLM(config).to(dtype), weights, inputs)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return model.eval(), compressor


def checkpoint(folder: Path, kind: str) -> Path:
    """Write a quantised model as llm-compressor does."""
    model, compressor = made(*KINDS[kind])
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


def loaded(folder: Path) -> nn.Module:
    """Load a checkpoint with transformers; zeros that are packed it takes for damaged (5.23, compressed-tensors 0.20.1)."""
    held = load_file(folder / "model.safetensors")
    if any(name.endswith("weight_zero_point") for name in held):
        model, _ = made(*KINDS[ASYMMETRIC])
        model.load_state_dict(held)
        return model
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def tuned_on(folder: Path, **rule: Any) -> nn.Module:
    rules = {"version": 1, "rules": [{"match": {"name": SITES}, "lora": {"r": 4, **rule}}]}
    tuned = lora_fx.apply(loaded(folder), rules, {"input_ids": IDS}, backend="modules")
    randomise_(tuned, 0.02)
    return tuned.eval()


def batches() -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(seed))} for seed in range(4)
    ]


def codes_in(folder: Path) -> dict[str, torch.Tensor]:
    held = load_file(folder / "model.safetensors")
    return {path: held.get(f"{path}.weight_packed", held.get(f"{path}.weight")) for path in SITES}


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_a_merge_in_memory_and_the_library_reads_them(kind: str, tmp_path: Path):
    base = checkpoint(tmp_path / "base", kind)
    tuned = tuned_on(base)
    lora_fx.save(tuned, tmp_path / "adapter")
    assert lora_fx.input_covariances(tuned, batches(), tmp_path / "inputs") == SITES
    near = lora_fx.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "near")
    report = lora_fx.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", covariances=tmp_path / "inputs")
    merged, sites = lora_fx.merged_on_grid(tuned, batches())
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys()
    assert changed == {tensor.name for tensor in report.tensors}
    assert {name.rpartition(".")[0] for name in changed} == set(SITES)
    for name in ("config.json", "generation_config.json"):
        assert (base / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    exact = lora_fx.merge(tuned)
    kept = {tensor.name.rpartition(".")[0]: tensor.kept for tensor in report.tensors}
    for site in sites:
        layer, scheme = loaded(base).get_submodule(site.path), loaded(base).get_submodule(site.path).quantization_scheme
        library = compressors.BaseCompressor.get_value_from_registry(scheme.format)
        state = {name: p.data for name, p in layer._parameters.items() if p is not None and name != "bias"}
        again = library.compress(
            library.decompress(state, scheme) | {"weight": exact.get_submodule(site.path).weight}, scheme
        )
        theirs = again.get("weight_packed", again.get("weight"))
        if "bfloat16" not in kind:  # of which the merge in memory rounds W'
            assert torch.equal(codes_in(tmp_path / "near")[site.path], theirs), "the library's own nearest codes"
            ours = merged.get_submodule(site.path)._parameters
            assert torch.equal(codes_in(tmp_path / "out")[site.path], ours.get("weight_packed", ours.get("weight")))
        assert kept[site.path] == pytest.approx(site.kept, abs=0.02)
    assert any(site.kept > site.nearest for site in sites) or "int8" in kind
    with torch.no_grad():
        wanted, before = exact(IDS).logits, copied(loaded(base))(IDS).logits
        read, nearest = (copied(loaded(tmp_path / name))(IDS).logits for name in ("out", "near"))
    assert max((read - wanted).norm(), (nearest - wanted).norm()) < (before - wanted).norm()
    assert all(tensor.kept is None and tensor.survived is not None for tensor in near.tensors)
    assert "kept" in str(report)
    assert "kept" not in str(near)


def test_lengths_several_adapters_several_rows_at_a_time_and_nearest_where_they_are_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = checkpoint(tmp_path / "base", "int4")
    exact = {}
    for name, tuned in {"dora": tuned_on(base, dora=True), "other": tuned_on(base, alpha=9)}.items():
        lora_fx.save(tuned, tmp_path / name)
        exact[name] = lora_fx.merge(tuned)
        lora_fx.input_covariances(tuned, batches(), tmp_path / f"{name}.inputs")
        lora_fx.merge_checkpoint(base, tmp_path / name, tmp_path / f"{name} whole")
        guided = lora_fx.merge_checkpoint(
            base, tmp_path / name, tmp_path / f"{name} guided", covariances=tmp_path / f"{name}.inputs"
        )
        assert all(tensor.kept > 0 for tensor in guided.tensors)
    monkeypatch.setattr(coded, "_AT_ONCE", 96 * 5)
    monkeypatch.setattr(coded, "_SHARE", 1 << 20)
    for name in ("dora", "other"):
        lora_fx.merge_checkpoint(base, tmp_path / name, tmp_path / f"{name} rows")
        assert_same_codes(tmp_path / f"{name} rows", tmp_path / f"{name} whole")
        lora_fx.merge_checkpoint(
            base, tmp_path / name, tmp_path / f"{name} guided rows", covariances=tmp_path / f"{name}.inputs"
        )
        assert_same_codes(tmp_path / f"{name} guided rows", tmp_path / f"{name} guided")
    tensors = load_file(tmp_path / "other.inputs")
    with_held = {name: torch.zeros_like(t) if name.endswith("held") else t for name, t in tensors.items()}
    save_file(with_held, tmp_path / "no effect", {"lora_fx.covariances": "1"})
    lora_fx.merge_checkpoint(base, tmp_path / "other", tmp_path / "fallen", covariances=tmp_path / "no effect")
    assert_same_codes(tmp_path / "fallen", tmp_path / "other whole")
    lora_fx.save(tuned_on(base, alpha=9), tmp_path / "twice")
    both = lora_fx.merge_checkpoint(base, [tmp_path / "other", tmp_path / "twice"], tmp_path / "both")
    assert [len(tensor.adapters) for tensor in both.tensors] == [2, 2]
    assert any(
        not torch.equal(a, codes_in(tmp_path / "other whole")[p]) for p, a in codes_in(tmp_path / "both").items()
    )


def test_shards_and_the_command_give_the_same_codes(tmp_path: Path):
    model, compressor = made(*KINDS["int4"])
    model.save_pretrained(tmp_path / "shards", max_shard_size="9KB")
    compressor.update_config(str(tmp_path / "shards"))
    placed = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())["weight_map"]
    assert placed[f"{SITES[0]}.weight_packed"] != placed[f"{SITES[0]}.weight_scale"]
    base = checkpoint(tmp_path / "base", "int4")
    tuned, adapter, inputs = tuned_on(base), tmp_path / "adapter", tmp_path / "inputs"
    lora_fx.save(tuned, adapter)
    lora_fx.input_covariances(tuned, batches(), inputs)
    lora_fx.merge_checkpoint(base, adapter, tmp_path / "whole", covariances=inputs)
    rows = torch.cat([batch["input_ids"] for batch in batches()])
    save_file({"input_ids": rows}, data := tmp_path / "data.safetensors")
    (tmp_path / "made.py").write_text(
        f"from safetensors.torch import load_file\nmake = lambda: [load_file({str(data)!r})['input_ids'][n:n + 4] for n in "
        "range(0, 16, 4)]\ndicts = lambda: [{'input_ids': ids} for ids in make()]\n"
    )
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    for n, given in enumerate(
        (["--covariances", inputs], ["--data", f"{tmp_path / 'made.py'}:dicts"], ["--data", data])
    ):
        out = tmp_path / f"out{n}"
        result = CliRunner().invoke(
            main, [str(word) for word in ("merge", tmp_path / "shards", adapter, "-o", out, *given)]
        )
        assert result.exit_code == 0, result.output
        assert "kept" in result.output
        held = {key: tensor for file in out.glob("*.safetensors") for key, tensor in load_file(file).items()}
        assert held.keys() == whole.keys()
        if n < 2:  # the file is cut into eight batches, of which others are held back
            assert all(torch.equal(held[key], tensor) for key, tensor in whole.items())
    save_file({"a": rows, "b": rows[:3].clone()}, tmp_path / "uneven.safetensors")
    for given, reason in {
        ("--data", data, "--covariances", inputs): "two ways of one thing",
        ("--data", tmp_path / "uneven.safetensors"): r"as many in each\n *a +\[16, 12\]\n *b +\[3, 12\]",
        ("--data", f"{tmp_path / 'made.py'}:make"): "a bare tensor",
        ("--data", f"{tmp_path / 'made.py'}:path"): "has no 'path'",
        ("--data", "ids"): r"--data ids: give a \.safetensors file",
        (adapter, "--data", data): "takes one directory",
    }.items():
        words = ["merge", tmp_path / "shards", adapter, "-o", tmp_path / "no", *given]
        result = CliRunner().invoke(main, list(map(str, words)))
        assert result.exit_code, given
        assert re.search(reason, result.output + str(result.exception)), result.output
    assert not (tmp_path / "no").exists()


def assert_same_codes(one: Path, other: Path) -> None:
    assert all(torch.equal(codes, codes_in(other)[path]) for path, codes in codes_in(one).items())


def test_what_codes_cannot_hold_or_files_do_not_fit_is_refused_by_name_and_nothing_is_written(tmp_path: Path):
    base = checkpoint(tmp_path / "base", "int4")
    tuned = tuned_on(base)
    adapter, inputs, out = (tmp_path / name for name in ("adapter", "inputs", "out"))
    lora_fx.save(tuned, adapter)
    lora_fx.input_covariances(tuned, batches(), inputs)
    held = load_file(inputs)
    for name, tensors in {
        "few": {name: t for name, t in held.items() if "q_proj" in name},
        "wide": held | {f"{SITES[0]}.{part}": torch.eye(8) for part in ("rounding", "held")},
        "odd": held | {f"{SITES[0]}.rounding": -torch.eye(64)},
        "nan": held | {f"{SITES[1]}.held": torch.full((96, 96), torch.nan)},
    }.items():
        save_file(tensors, tmp_path / name, {"lora_fx.covariances": "1"})
    save_file(held, tmp_path / "others", {"format": "pt"})
    save_file(held, tmp_path / "torn", {"lora_fx.covariances": "1", "values": '{"a": [1.0]}'})
    for reason, given in {
        r"down_proj.weight +the file has no covariance of": {"covariances": tmp_path / "few"},
        r"q_proj.weight +the file has \[8, 8\] of .*, for rows of 64": {"covariances": tmp_path / "wide"},
        r"no inputs have the covariance": {"covariances": tmp_path / "odd"},
        r"covariance of its inputs has NaN": {"covariances": tmp_path / "nan"},
        r"is damaged: what it notes": {"covariances": tmp_path / "torn"},
        r"is no file of `lora_fx.input_covariances`": {"covariances": tmp_path / "others"},
        r"is quantised, and codes have no other dtype": {"out_dtype": "float16"},
        r"rounding='stochastic' is for floats": {"rounding": "stochastic"},
    }.items():
        with pytest.raises(MergeError, match=reason):
            lora_fx.merge_checkpoint(base, adapter, out, **given)
        shutil.rmtree(out, ignore_errors=True)
    plain = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(base))
    del plain.config.quantization_config
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(MergeError, match="no adapted weight of this checkpoint is held as codes"):
        lora_fx.merge_checkpoint(tmp_path / "plain", adapter, out, covariances=inputs)
    with pytest.raises(RefusedError, match="1, where two are needed"):
        lora_fx.input_covariances(tuned, batches()[:1], tmp_path / "none")
    with pytest.raises(RefusedError, match="the model is not adapted"):
        lora_fx.input_covariances(plain, batches(), tmp_path / "none")
    with pytest.raises(lora_fx.CaptureError, match="a batch of `data` is a bare tensor"):
        lora_fx.input_covariances(tuned, [torch.zeros(2, 2)], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    held = load_file((other := shutil.copytree(base, tmp_path / "other")) / "model.safetensors")
    held[f"{SITES[0]}.weight_scale"] *= 1.1
    save_file(held, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=r"q_proj.weight +is of another base"):
        lora_fx.merge_checkpoint(other, adapter, out, covariances=inputs)
    config = json.loads((base / "config.json").read_text())
    for reason, changed in {
        "quant_method gptq": {"quant_method": "gptq"},
        "quantization_status frozen": {"quantization_status": "frozen"},
        "transform_config changes": {"transform_config": {"config_groups": {"a": {}}}},
        "codes of a kind that config.json does not tell": {"config_groups": {}},
    }.items():
        other = shutil.copytree(base, tmp_path / reason.replace(" ", "_"))
        method = config["quantization_config"] | changed
        (other / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
        with pytest.raises(MergeError, match=reason):
            lora_fx.merge_checkpoint(other, adapter, out)
    whole = lora_fx.apply(plain, RULES | {"train": [SITES[0].replace("q_", "k_")]}, {"input_ids": IDS})
    lora_fx.save(whole, tmp_path / "whole")
    with pytest.raises(MergeError, match=r"k_proj.weight +is held as codes here, and trained whole"):
        lora_fx.merge_checkpoint(base, tmp_path / "whole", out)
    assert not out.exists()


MEASURED = """
import sys, torch, lora_fx
torch.set_num_threads(4)  # as many as a merge has workers at most
merge = lora_fx.merge_checkpoint
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))
base, adapter, out, inputs = sys.argv[1:]
for given in (None, inputs):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    idle = status("VmRSS")
    merge(base, adapter, f"{out}-{given is None}", covariances=given)
    print(1024 * (status("VmHWM") - idle))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
def test_memory_is_64_mib_and_for_chosen_codes_what_is_told_beside(tmp_path: Path):
    size, rows = 2048, 1 << 12
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (rows, size // 8)).to(torch.int32)
    scale = torch.full((rows, size // 128), 0.01, dtype=torch.bfloat16)
    tensors = {"up.weight_packed": words, "up.weight_scale": scale, "up.weight_shape": torch.tensor([rows, size])}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    method = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "format": "pack-quantized"}
    method |= {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}}
    base = write_base(tmp_path / "base", tensors, config={"quantization_config": method})
    adapter = write_adapter(tmp_path / "adapter", held := factors("up", rows, size))
    moments = {f"up.{part}": (x := torch.randn(2 * size, size)).t() @ x for part in ("rounding", "held")}
    save_file(moments, tmp_path / "inputs", {"lora_fx.covariances": "1"})
    command = [sys.executable, "-c", MEASURED, *map(str, (base, adapter, tmp_path / "out", tmp_path / "inputs"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    own = sum(tensor.nbytes for tensor in held.values())
    nearest, chosen = (int(number) - own for number in done.stdout.split())
    assert nearest <= 64 << 20, nearest
    assert chosen <= (64 << 20) + 24 * size**2, chosen


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_words_are_the_librarys(bits: int):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, 37)).to(torch.int8)
    words = helpers.pack_to_int32(codes, bits)
    assert torch.equal(coded.packed(codes, bits), words)
    assert torch.equal(coded.unpacked(words, bits)[:, :37], codes)
