"""A merged model in Q4_0 for llama.cpp: the codes that were chosen, in blocks that the gguf package reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("gguf")

import gguf
import numpy as np

import lora_fx
from lora_fx.cli import main
from lora_fx.errors import ExportError
from tests.support.ggufbase import VOCABULARY, language_model, prompts, write_base
from tests.support.zoo import randomise_, rules

LINEARS = {"match": {"name": "model.layers.**", "op": "linear"}, "lora": {"r": 4, "alpha": 8}}
pytestmark = pytest.mark.filterwarnings("ignore:the grid cannot hold the adapter")


def adapted(*chosen: dict[str, Any]) -> nn.Module:
    tuned = lora_fx.apply(language_model("Llama"), {"version": 1, "rules": list(chosen)}, backend="modules")
    randomise_(tuned)
    return tuned


def batches() -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(seed))}
        for seed in range(4)
    ]


def held(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, np.ndarray]]]:
    """Return the settings of a file, and its tensors' types and bytes."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: (tensor.tensor_type.name, np.array(tensor.data)) for tensor in reader.tensors}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """Return the adapted model, and the folder of its base and of what was exported."""
    folder = tmp_path_factory.mktemp("q4_0")
    write_base("Llama", language_model("Llama"), folder / "base.gguf")
    tuned = adapted({"match": {"name": "**.gate_proj"}, "skip": "base only"}, LINEARS)
    lora_fx.add(tuned, {"version": 1, "rules": [{"match": {"name": "**.gate_proj"}, "lora": {"r": 2}}]}, adapter="idle")
    lora_fx.use(tuned, "default")
    lora_fx.export(tuned, folder / "whole.gguf", "gguf_q4_0", base=folder / "base.gguf", data=batches())
    return tuned, folder


def test_adapted_weights_are_the_chosen_codes_and_all_else_is_the_bases_bytes(made: tuple[nn.Module, Path]):
    tuned, folder = made
    merged, sites = lora_fx.merged_on_grid(tuned, batches(), grid="q4_0")
    write_base("Llama", merged, folder / "merged.gguf")
    (settings, tensors), (_, exact) = held(folder / "whole.gguf"), held(folder / "merged.gguf")
    before, old = held(folder / "base.gguf")
    assert settings == before | {"general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0, "general.quantization_version": 2}
    assert tensors.keys() == old.keys()
    coded = {name for name, (kind, _) in tensors.items() if kind == "Q4_0"}
    assert len(coded) == len(sites) == 12
    for name, (kind, data) in tensors.items():
        if name in coded:
            assert np.array_equal(gguf.dequantize(data, gguf.GGMLQuantizationType.Q4_0), exact[name][1]), name
        else:
            assert (kind, data.tobytes()) == ("F32", old[name][1].tobytes())


def test_the_command_takes_rows_of_a_file_as_batches(tmp_path: Path):
    tuned, rows = adapted(LINEARS), torch.cat([batch["input_ids"] for batch in batches()])
    language_model("Llama").save_pretrained(tmp_path / "model")
    lora_fx.save(tuned, tmp_path / "adapter")
    save_file({"input_ids": rows}, tmp_path / "rows.safetensors")
    write_base("Llama", language_model("Llama"), base := tmp_path / "base.gguf")
    eight = [{"input_ids": pair} for pair in rows.split(2)]
    lora_fx.export(tuned, tmp_path / "python.gguf", "gguf_q4_0", base=base, data=eight)
    words = ["export", f"hf:{tmp_path / 'model'}", tmp_path / "adapter", "-o", tmp_path / "shell.gguf"]
    words += ["--target", "gguf_q4_0", "--set", f"base={base}", "--data", tmp_path / "rows.safetensors"]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "shell.gguf").read_bytes() == (tmp_path / "python.gguf").read_bytes()
    result = CliRunner().invoke(main, [*map(str, words[:5]), "--target", "gguf", *map(str, words[-2:])])
    assert result.exit_code
    assert "there is no option data" in result.output + str(result.exception)


@pytest.mark.slow
def test_llama_cpp_computes_what_the_merged_model_computes_and_another_base_is_found_out(tmp_path: Path):
    pytest.importorskip("xllamacpp")
    tuned, asked = adapted(LINEARS), {"example_inputs": prompts(), "verify": True, "data": batches()}
    for kind in ("F32", "F16", "Q8_0"):
        write_base("Llama", language_model("Llama"), tmp_path / f"{kind}.gguf", kind)
        done = lora_fx.export(tuned, tmp_path / "whole.gguf", "gguf_q4_0", base=tmp_path / f"{kind}.gguf", **asked)
        assert done.difference <= done.tolerance < 0.05 * done.effect, "what layers multiply by is rounded as there"
    other = language_model("Llama")
    other.model.norm.weight.data *= 1.1  # of which no linear layer tells
    write_base("Llama", other, tmp_path / "other.gguf")
    write_base("Llama", language_model("Llama"), tmp_path / "Q5_1.gguf", "Q5_1")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for base, reason in {
        "other": "llama.cpp computes something else",
        "Q5_1": "lm_head +output.weight is Q5_1",
    }.items():
        with pytest.raises(ExportError, match=reason):
            lora_fx.export(tuned, tmp_path / "whole.gguf", "gguf_q4_0", base=tmp_path / f"{base}.gguf", **asked)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_the_file_cannot_hold_or_is_not_of_this_base_is_refused_by_name(tmp_path: Path):
    base = tmp_path / "base.gguf"
    write_base("Llama", language_model("Llama"), base)
    other = language_model("Llama")
    nn.init.normal_(other.model.layers[1].mlp.up_proj.weight)
    write_base("Llama", other, tmp_path / "other.gguf")
    write_base("Qwen2", language_model("Qwen2"), tmp_path / "qwen2.gguf")
    (tmp_path / "text.gguf").write_text("GGUF" * 20)
    out, before = tmp_path / "out.gguf", sorted(tmp_path.iterdir())
    tuned = adapted(LINEARS)
    for reason, given in {
        r"needs the base model as a GGUF file, and batches of inputs": {"base": base},
        r"layers.1.mlp.up_proj +blk.1.ffn_up.weight has other values": {"base": tmp_path / "other.gguf"},
        r"is a 'qwen2', the model a 'llama'": {"base": tmp_path / "qwen2.gguf"},
        r"cannot be read as GGUF": {"base": tmp_path / "text.gguf"},
    }.items():
        with pytest.raises(ExportError, match=reason):
            lora_fx.export(tuned, out, "gguf_q4_0", **given, **({} if "needs" in reason else {"data": batches()}))
    for reason, chosen in {
        "codes are chosen for linear layers": ("Llama", rules("model.embed_tokens")),
        "biases as they were": ("Qwen2", rules("**.q_proj", bias=True)),
        "trained whole as it was": ("Llama", rules("**.q_proj", train=["lm_head"])),
        "rows of 80: Q4_0 takes multiples of 32": ("Llama", rules("**.down_proj")),
    }.items():
        kind, wanted = chosen
        sizes = {"intermediate_size": 80} if "rows" in reason else {}
        refused = lora_fx.apply(language_model(kind, **sizes), wanted, backend="modules")
        with pytest.raises(ExportError, match=reason):
            lora_fx.export(refused, out, "gguf_q4_0", base=base, data=batches())
    assert sorted(tmp_path.iterdir()) == before
