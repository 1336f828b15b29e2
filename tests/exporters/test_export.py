"""Exports are whole or not there at all; what a target cannot express is refused, at all sites at once, with a way out."""

from __future__ import annotations

import json
import time
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import lora_fx
from lora_fx import exporters
from lora_fx.errors import ExportError, RefusedError
from lora_fx.exporters import clients, diffusers, kohya, merged, mlx, peft, registry, running, vllm
from lora_fx.exporters.running import largest_difference, run_client
from lora_fx.exporters.target import FEATURES, Target
from tests.support import exporting
from tests.support.clientprocesses import FRESH
from tests.support.exporting import Fused, rule, specimen, tuned_of, written
from tests.support.kinds import Product, built
from tests.support.zoo import Mlp, features, rules

OURS = {"merged": merged, "peft": peft, "vllm": vllm, "diffusers": diffusers, "kohya": kohya, "mlx": mlx}
X = features(2, 6)


@pytest.fixture
def tuned() -> nn.Module:
    return specimen("linear")[0]


# -- the registry


def test_targets_of_the_package_are_listed():
    assert set(OURS) <= set(exporters.targets())
    assert all(target.name == name for name, target in exporters.targets().items())


def test_unknown_target_is_an_error_that_names_the_nearest(tuned, tmp_path):
    with pytest.raises(ExportError, match="did you mean diffusers") as caught:
        lora_fx.export(tuned, tmp_path / "x", "difusers")
    assert caught.value.target == "difusers"


def test_other_packages_add_targets_as_entry_points(tuned, tmp_path, monkeypatch):
    entry = EntryPoint("mine", "tests.exporters.test_export:MINE", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    assert "mine" in exporters.names()
    lora_fx.export(tuned, tmp_path / "x", "mine")
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize("value", ["tests.exporters.test_export:X", "no_such_module:TARGET"])
def test_entry_point_that_leads_to_no_target_is_an_error(value, tuned, tmp_path, monkeypatch):
    entry = EntryPoint("mine", value, registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.raises(ExportError, match="mine"):
        lora_fx.export(tuned, tmp_path / "x", "mine")


def test_entry_point_cannot_take_the_name_of_a_target_of_ours(monkeypatch):
    entry = EntryPoint("peft", "tests.exporters.test_export:MINE", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    assert exporters.target_named("peft") is peft.TARGET
    assert exporters.names().count("peft") == 1


# -- what is checked before anything is written


def test_every_site_that_cannot_be_expressed_is_named_at_once(tmp_path):
    dora, _ = specimen("dora")
    with pytest.raises(ExportError) as caught:
        lora_fx.export(dora, tmp_path / "x", "vllm")
    assert [path for path, _ in caught.value.facts] == ["fc1", "fc2"]
    assert all("vLLM refuses DoRA" in reason and "target='merged'" in reason for _, reason in caught.value.facts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", OURS)
def test_table_says_what_each_target_refuses(name, feature):
    target = exporters.target_named(name)
    about_sites = [reason for path, reason in target.refused(specimen(feature)[0]) if path]
    assert bool(about_sites) == (target.expresses[feature] == "refused")
    assert all("target=" in reason or "`adapter:`" in reason for reason in about_sites), "each names a way out"


@pytest.mark.parametrize("name", exporters.names())
def test_every_target_says_of_every_feature_whether_it_expresses_it(name):
    assert list(exporters.target_named(name).expresses) == list(FEATURES)


def test_option_that_the_target_does_not_have_is_an_error(tuned, tmp_path):
    with pytest.raises(ExportError, match="there is no option colour") as caught:
        lora_fx.export(tuned, tmp_path / "x", "kohya", colour="red")
    assert caught.value.facts[0][0] == "prefix"


def test_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="not adapted"):
        lora_fx.export(Mlp(), tmp_path / "x", "merged")


def test_model_without_values_is_refused(tmp_path):
    with torch.device("meta"):
        model = Mlp()
    with pytest.raises(ExportError, match="meta device"):
        lora_fx.export(lora_fx.apply(model, rules()), tmp_path / "x", "merged")


def test_verifying_needs_inputs(tuned, tmp_path):
    with pytest.raises(ExportError, match="inputs are needed"):
        lora_fx.export(tuned, tmp_path / "x", "merged", verify=True)


def test_missing_client_is_named_with_the_extra_that_installs_it(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [EntryPoint("far", "tests.exporters.test_export:FAR", group)]
    )
    with pytest.raises(ExportError, match=r"needs no_such_client(.|\n)*pip install 'lora-fx\[far\]'"):
        lora_fx.export(tuned, tmp_path / "x", "far")


def test_model_that_no_client_knows_is_refused_as_a_whole(tuned, tmp_path):
    for name in ("diffusers", "mlx"):
        with pytest.raises(ExportError) as caught:
            lora_fx.export(tuned, tmp_path / "x", name)
        assert [path for path, _ in caught.value.facts] == [""]


# -- whole or not at all


def write_half(tuned, path):
    path.write_text("half")
    raise OSError(28, "No space left on device")


MINE = Target("mine", "one file", "nobody", lambda tuned: iter(()), lambda tuned, path: path.write_text("mine"))
HALF = Target("half", "one file", "nobody", lambda tuned: iter(()), write_half)
FAR = Target("far", "one file", "nobody", lambda tuned: iter(()), write_half, extra="far", needs=("no_such_client",))
WRONG = Target(
    "wrong", "one file", "nobody", MINE.refused, MINE.write, verify=lambda tuned, path, sample: float("nan"),
)  # fmt: skip


@pytest.fixture
def entries(monkeypatch):
    entry_points = [
        EntryPoint(name, f"tests.exporters.test_export:{name.upper()}", registry.GROUP)
        for name in ("mine", "half", "wrong")
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entry_points)


def test_failed_write_leaves_what_was_there(entries, tuned, tmp_path):
    (tmp_path / "x").write_text("before")
    with pytest.raises(ExportError, match="No space left"):
        lora_fx.export(tuned, tmp_path / "x", "half")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "before"


def test_what_the_client_computes_otherwise_is_not_written(entries, tuned, tmp_path):
    with pytest.raises(ExportError, match="nobody computes something else") as caught:
        lora_fx.export(tuned, tmp_path / "x", "wrong", (X,), verify=True)
    assert caught.value.facts[0] == ("max |Δ|", "nan")
    assert list(tmp_path.iterdir()) == []


def test_directory_with_other_files_is_left_alone(tuned, tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_text("of another export")
    with pytest.raises(ExportError, match="holds other files") as caught:
        lora_fx.export(tuned, tmp_path, "merged")
    assert caught.value.facts == (("model-00001-of-00002.safetensors",),)
    assert [path.name for path in tmp_path.iterdir()] == ["model-00001-of-00002.safetensors"]


def test_same_export_again_replaces_the_first(tuned, tmp_path):
    lora_fx.export(tuned, tmp_path / "x", "peft")
    (tmp_path / "x" / "adapter_config.json").write_text("spoilt")
    lora_fx.export(tuned, tmp_path / "x", "peft")
    assert json.loads((tmp_path / "x" / "adapter_config.json").read_text())["r"] == 3


def test_file_in_place_of_a_directory_is_an_error(tuned, tmp_path):
    (tmp_path / "x").write_text("a file")
    with pytest.raises(ExportError, match="is a file"):
        lora_fx.export(tuned, tmp_path / "x", "peft")


def test_adapted_model_is_as_it_was(tmp_path):
    tuned = tuned_of(built(Mlp), written(rule("fc*")), (X,)).train()
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    for name in ("merged", "peft", "kohya"):
        lora_fx.export(tuned, tmp_path / name, name)
    assert tuned.training
    assert all(torch.equal(value, before[name]) for name, value in tuned.state_dict().items())


# -- clients


@pytest.fixture(params=[pytest.param("a fresh process", marks=pytest.mark.slow), "a fork, as in these tests"])
def _both_ways(request, monkeypatch):
    if request.param == "a fresh process":
        monkeypatch.setattr(running, "_run", FRESH)


@pytest.mark.slow
@pytest.mark.usefixtures("_both_ways")
def test_client_returns_fails_with_its_last_words_or_is_killed(tmp_path):
    assert run_client("x", partial(sum, [1, 2])) == 3
    with pytest.raises(ExportError, match="status 1") as caught:
        run_client("merged", partial(clients.plain, Mlp(), tmp_path / "none", ((), {})))
    assert "No such file" in caught.value.facts[-1][0]
    with pytest.raises(ExportError, match="SIGABRT"):
        run_client("x", exporting.dies)


def test_client_that_takes_too_long_is_ended():
    with pytest.raises(ExportError, match=r"no answer in 0\.5 s"):
        run_client("x", partial(time.sleep, 60), seconds=0.5)


def test_model_that_cannot_be_pickled_is_an_error_with_a_way_out():
    with pytest.raises(ExportError, match="export without verify"):
        run_client("x", partial(clients.plain, lambda x: x))


def test_difference_counts_nan_as_infinite_and_wants_the_same_shapes():
    one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert largest_difference("x", [one], [one + 0.5]) == 0.5
    assert largest_difference("x", [one], [nan]) == float("inf")
    with pytest.raises(ExportError, match="other shapes"):
        largest_difference("x", [one], [torch.ones(3)])


def test_merged_weights_are_verified_in_a_process_without_lora_fx_modules(tuned, tmp_path):
    result = lora_fx.export(tuned, tmp_path / "x", "merged", (X,), verify=True)
    assert result.difference < 1e-5 < 0.1 < result.effect
    assert "verified in transformers, diffusers or torch: max |Δ|" in str(result)
    plain = built(Mlp)
    plain.load_state_dict(load_file(tmp_path / "x" / "model.safetensors"))
    torch.testing.assert_close(plain(X), tuned(X))


# -- what stands in the files: each trap, without a client


def delta(tuned: nn.Module, path: str) -> torch.Tensor:
    return lora_fx.merge(tuned).get_parameter(f"{path}.weight") - lora_fx.remove(tuned).get_parameter(f"{path}.weight")


def mixed() -> nn.Module:
    """Two ranks, two scalings, neither of which is 1."""
    return tuned_of(built(Mlp), written(rule("fc1", r=2, alpha=7), rule("fc2", r=4, alpha=1)), (X,))


def test_kohya_has_one_alpha_for_all_layers(tmp_path):
    model = mixed()
    lora_fx.export(model, tmp_path / "x.safetensors", "kohya")
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors["lora_unet_fc1.alpha"] == 7
    assert tensors["lora_unet_fc2.alpha"] == 7
    for path, rank in (("fc1", 2), ("fc2", 4)):
        up, down = tensors[f"lora_unet_{path}.lora_up.weight"], tensors[f"lora_unet_{path}.lora_down.weight"]
        assert up.shape[1] == rank
        torch.testing.assert_close(up @ down * (7 / rank), delta(model, path))


def test_kohya_refuses_names_that_two_modules_get(tmp_path):
    model = nn.ModuleDict({"a_b": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4)})})
    chosen = lora_fx.apply(model, written(rule("a_b")))
    with pytest.raises(ExportError, match="another module gets its name, a_b"):
        lora_fx.export(chosen, tmp_path / "x", "kohya")


def test_diffusers_writes_ranks_as_alphas_into_the_metadata_since_it_takes_them_for_that_without(tmp_path):
    diffusers.write(mixed(), tmp_path, "transformer")
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        content = json.loads(file.metadata()["lora_adapter_metadata"])
        keys = set(file.keys())
    assert (content["transformer.r"], content["transformer.lora_alpha"]) == (2, 2)
    assert content["transformer.alpha_pattern"] == content["transformer.rank_pattern"] == {"^fc2": 4}
    assert "transformer.fc1.lora_A.weight" in keys


def test_mlx_has_one_rank_and_one_scale_and_the_same_deltas(tmp_path):
    model = mixed()
    mlx.write(model, tmp_path)
    tensors = load_file(tmp_path / "adapters.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())["lora_parameters"]
    assert (config["rank"], config["scale"], config["keys"]) == (4, 3.5, ["fc1", "fc2"])
    for path in ("fc1", "fc2"):
        assert 4 in tensors[f"{path}.lora_a"].shape
        theirs = (tensors[f"{path}.lora_a"] @ tensors[f"{path}.lora_b"]).mT * config["scale"]
        torch.testing.assert_close(theirs, delta(model, path))


def test_vllm_bakes_all_scalings_into_one_on_request(tmp_path):
    model = mixed()
    lora_fx.export(model, tmp_path / "x", "vllm", bake=True)
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"], config["rank_pattern"]) == (4, 14.0, {}, {})
    tensors = load_file(tmp_path / "x" / "adapter_model.safetensors")
    for path in ("fc1", "fc2"):
        A, B = (tensors[f"base_model.model.{path}.lora_{factor}.weight"] for factor in "AB")
        torch.testing.assert_close(B @ A * (14 / 4), delta(model, path))


def test_vllm_refuses_ranks_above_its_largest(tmp_path):
    wide = lora_fx.apply(nn.Sequential(nn.Linear(600, 600)), written(rule("0", r=513)), backend="modules")
    with pytest.raises(ExportError, match="rank 513 is above vLLM's largest, 512"):
        lora_fx.export(wide, tmp_path / "x", "vllm")


def test_peft_refuses_raw_parameters_of_the_root(tmp_path):
    tuned = tuned_of(built(Product), written(rule("w")), (torch.randn(3, 8),))
    with pytest.raises(ExportError, match="what the model itself owns") as caught:
        lora_fx.export(tuned, tmp_path / "x", "peft")
    assert [path for path, _ in caught.value.facts] == ["w"]


@pytest.mark.parametrize("name", ["peft", "kohya"])
def test_parts_of_a_fused_weight_become_more_ranks_with_zeros_elsewhere(name, tmp_path):
    model, _ = specimen("slices")
    lora_fx.export(model, tmp_path / "x", name)
    tensors = load_file(tmp_path / "x" if name == "kohya" else tmp_path / "x" / "adapter_model.safetensors")
    (B,) = (value for key, value in tensors.items() if key.endswith(("lora_B.weight", "lora_up.weight")))
    assert B.shape == (24, 6)
    assert not B[8:16].any()
    assert isinstance(model.get_submodule("qkv"), nn.Linear)
    assert exporting.FEATURES["slices"]()[0].__class__ is Fused


def test_merged_writes_tied_weights_under_all_their_names(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    chosen = lora_fx.apply(model, written(rule("c")), backend="modules")
    lora_fx.export(chosen, tmp_path / "x.safetensors", "merged")
    assert {"a.weight", "b.weight", "c.weight"} <= set(load_file(tmp_path / "x.safetensors"))


# -- the command line


def test_command_line_writes_what_the_function_writes(tmp_path: Path):
    from click.testing import CliRunner

    from lora_fx.cli import main

    torch.manual_seed(0)
    tuned = tuned_of(Mlp(), written(rule("fc*")), (X,))
    lora_fx.save(tuned, tmp_path / "adapter")
    lora_fx.export(tuned, tmp_path / "function.safetensors", "kohya", prefix="lora_te1")
    arguments = ["export", "tests.exporters.test_export:mlp", str(tmp_path / "adapter"), "--target", "kohya"]
    arguments += ["-o", str(tmp_path / "command.safetensors"), "--set", "prefix=lora_te1"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.strip() == f"kohya: {tmp_path / 'command.safetensors'} written"
    assert (tmp_path / "command.safetensors").read_bytes() == (tmp_path / "function.safetensors").read_bytes()


def test_command_line_tells_what_is_refused_and_fails(tmp_path: Path):
    from click.testing import CliRunner

    from lora_fx.cli import main

    lora_fx.save(specimen("dora")[0], tmp_path / "adapter")
    arguments = [
        "export",
        "tests.exporters.test_export:base",
        str(tmp_path / "adapter"),
        "--target",
        "vllm",
        "-o",
        str(tmp_path / "x"),
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "vLLM refuses DoRA" in result.output


def mlp():
    torch.manual_seed(0)
    return Mlp(), (X,)


def base():
    return built(Mlp)
