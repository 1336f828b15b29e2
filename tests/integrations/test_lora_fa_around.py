"""LoRA-FA in files, beside PEFT and its optimizer, in trainers' checkpoints and in DistributedDataParallel."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_fx
from lora_fx.errors import AdapterFileError
from lora_fx.files.adapter.header import header_text
from lora_fx.passes.verify import verify
from tests.support import zoo
from tests.support.processes import in_processes

RANK, ALPHA = 2, 3
SCALING = ALPHA / RANK


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(torch.tanh(self.first(x)))
        return made


def base() -> nn.Module:
    torch.manual_seed(0)
    return Net()


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def rules(**lora: Any) -> dict[str, Any]:
    lora = {"r": RANK, "alpha": ALPHA, "lora_fa": True, **lora}
    return {"version": 1, "rules": [{"match": {"name": "{first,last}"}, "lora": lora}]}


def adapted(**lora: Any) -> nn.Module:
    tuned = lora_fx.apply(base(), rules(**lora))
    zoo.randomise_(tuned)
    return tuned


def frozen_in(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if "lora_" in name and not p.requires_grad}


def step(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(X).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- files


def test_a_saved_adapter_comes_back_with_a_frozen(tmp_path: Path):
    tuned = adapted()
    lora_fx.save(tuned, tmp_path)
    loaded = lora_fx.load(base(), tmp_path)
    assert frozen_in(loaded) == frozen_in(tuned) == {f"{layer}.lora_A.default.weight" for layer in ("first", "last")}
    assert torch.equal(loaded(X), tuned(X))
    found, expected = step(loaded), step(tuned)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())
    lora_fx.save(loaded, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("trainable", [True, False])
def test_an_adapter_that_is_added_leaves_a_frozen_whatever_is_trained(tmp_path: Path, trainable: bool):
    lora_fx.save(adapted(), tmp_path)
    for source in (str(tmp_path), rules(), adapted()):
        tuned = lora_fx.apply(base(), rules(lora_fa=False, adapter="first"))
        lora_fx.add(tuned, source, adapter="b", trainable=trainable)
        asked = {name for name, p in tuned.named_parameters() if ".b." in name and p.requires_grad}
        assert asked == ({f"{layer}.lora_B.b.weight" for layer in ("first", "last")} if trainable else set())


def test_files_of_before_there_was_the_key_are_of_plain_lora(tmp_path: Path):
    lora_fx.save(adapted(lora_fa=False), tmp_path)
    text, raw = "adapter_model.safetensors", {}
    with safe_open(tmp_path / text, framework="pt") as file:
        metadata, raw = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = json.loads(metadata["lora_fx"])
    for site in content["sites"].values():
        del site["lora_fa"]
    del content["format"], content["sha256"]
    save_file(raw, tmp_path / text, {**metadata, "lora_fx": header_text(content, raw)})
    assert frozen_in(lora_fx.load(base(), tmp_path)) == set()


def test_a_note_that_is_no_switch_is_refused(tmp_path: Path):
    lora_fx.save(adapted(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {key: text.replace('"lora_fa":true', '"lora_fa":1') for key, text in metadata.items()})
    with pytest.raises(AdapterFileError, match="lora_fa is 1"):
        lora_fx.load(base(), tmp_path)


def test_other_values_are_taken_and_a_stays_frozen(tmp_path: Path):
    other, tuned = adapted(), lora_fx.apply(base(), rules())
    lora_fx.save(other, tmp_path)
    lora_fx.swap(tuned, str(tmp_path), adapter="default")
    assert torch.equal(tuned(X), other(X))
    verify(tuned)
    fresh = lora_fx.apply(base(), rules())
    lora_fx.load_adapter_state(fresh, lora_fx.adapter_state(other))
    assert torch.equal(fresh(X), other(X))


# -- PEFT


def in_peft(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["first", "last"])
    return peft.get_peft_model(copy.deepcopy(model), config)


def filled_peft() -> Any:
    theirs = in_peft(base())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return theirs


def test_what_pefts_optimizer_freezes_is_frozen_here_and_b_has_its_gradient():
    theirs = filled_peft()
    from peft.optimizers import create_lorafa_optimizer

    create_lorafa_optimizer(theirs, r=RANK, lora_alpha=ALPHA, lr=0.1)
    tuned = lora_fx.from_peft(theirs, (X,))
    verify(tuned)
    assert frozen_in(tuned) == {name.removeprefix("base_model.model.") for name in frozen_in(theirs)}
    expected = {name.removeprefix("base_model.model."): grad for name, grad in step(theirs).items()}
    found = step(tuned)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], grad, rtol=1e-5, atol=1e-5) for name, grad in expected.items())


def test_pefts_optimizer_multiplies_the_gradient_of_b_and_here_the_optimizer_gets_it_as_it_is():
    theirs = filled_peft()
    from peft.optimizers import create_lorafa_optimizer

    optimizer = create_lorafa_optimizer(theirs, r=RANK, lora_alpha=ALPHA, lr=0.1)
    tuned = lora_fx.from_peft(theirs, (X,))
    step(theirs)
    optimizer.step()
    ours = step(tuned)
    for layer in ("first", "last"):
        A = tuned.get_parameter(f"{layer}.lora_A.default.weight").detach()
        gradient = ours[f"{layer}.lora_B.default.weight"]
        first = optimizer.state[f"base_model.model.{layer}.lora"]["exp_avg_B"] / (1 - 0.9)
        expected = gradient @ torch.linalg.inv(A @ A.t()) / SCALING**2
        assert (first - expected).abs().max() <= 0.02 * expected.abs().max()  # PEFT multiplies in bfloat16
        assert (first - gradient).abs().max() > 0.1 * gradient.abs().max()


def test_a_model_that_goes_to_peft_leaves_a_frozen_and_comes_back():
    tuned = adapted()
    theirs = lora_fx.to_peft(tuned) if pytest.importorskip("peft") else None
    assert theirs is not None
    assert frozen_in(theirs) == {f"base_model.model.{name}" for name in frozen_in(tuned)}
    assert torch.allclose(theirs(X), tuned(X), atol=1e-6)
    back = lora_fx.from_peft(theirs, (X,))
    assert frozen_in(back) == frozen_in(tuned)
    plain = lora_fx.to_peft(adapted(lora_fa=False))
    assert frozen_in(plain) == set()
    assert frozen_in(lora_fx.from_peft(plain, (X,))) == set()


def test_an_adapter_that_peft_does_not_train_now_is_no_lora_fa():
    theirs = in_peft(base())
    theirs.add_adapter("other", theirs.peft_config["default"])
    tuned = lora_fx.from_peft(theirs, (X,))
    assert frozen_in(tuned) == set()


def test_peft_reads_the_file_and_computes_the_same(tmp_path: Path):
    peft = pytest.importorskip("peft")
    tuned = adapted()
    lora_fx.save(tuned, tmp_path)
    assert torch.allclose(peft.PeftModel.from_pretrained(base(), tmp_path)(X), tuned(X), atol=1e-6)


# -- trainers


def test_checkpoints_of_the_trainer_hold_a_which_another_run_would_draw_otherwise():
    pytest.importorskip("transformers")
    from lora_fx.integrations.pretrained import trained_tensors

    assert set(trained_tensors(adapted())) == {
        f"{at}.lora_{f}.default.weight" for at in ("first", "last") for f in "AB"
    }


def test_checkpoints_of_lightning_take_a_for_no_part_of_the_base():
    pytest.importorskip("lightning")
    from lora_fx.integrations.lightning import base_of

    assert set(base_of(adapted())) == {f"{at}.{name}" for at in ("first", "last") for name in ("weight", "bias")}


def steps_of_data_parallel(_: Path) -> dict[str, Tensor]:
    wrapped = nn.parallel.DistributedDataParallel(adapted(), find_unused_parameters=False)
    for _ in range(2):  # the second step fails where a gradient of the first is waited for
        found = step(wrapped)
    return found


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_processes_wait_for_no_gradient_of_a(tmp_path: Path):
    expected = step(adapted())
    (found,) = in_processes(1, steps_of_data_parallel, tmp_path)
    assert {name.removeprefix("module."): grad.shape for name, grad in found.items()} == {
        name: grad.shape for name, grad in expected.items()
    }
    assert all(torch.equal(found[f"module.{name}"], grad) for name, grad in expected.items())
