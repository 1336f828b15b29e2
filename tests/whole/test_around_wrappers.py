"""What libraries put around a model is seen through, or refused by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_fx
from lora_fx.models.wrappers import without_wrappers
from tests.support.around import assert_close, filled, llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of PEFT
RULES = {"version": 1, "rules": [{"match": {"name": "**", "op": "linear"}, "lora": {"r": 2, "alpha": 4}}]}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 3)).eval()


def given() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def adapted() -> nn.Module:
    return filled(lora_fx.apply(model(), RULES, (given(),)))


def compiled(tuned: nn.Module) -> nn.Module:
    return torch.compile(tuned, backend="eager")


def in_parallel(tuned: nn.Module) -> nn.Module:
    return nn.DataParallel(tuned)


def with_a_compiled_child(tuned: nn.Module) -> nn.Module:
    tuned[2] = torch.compile(tuned[2], backend="eager")
    return tuned


def with_a_checkpointed_child(tuned: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    tuned[2] = checkpoint_wrapper(tuned[2])
    return tuned


def twice(tuned: nn.Module) -> nn.Module:
    return nn.DataParallel(torch.compile(tuned, backend="eager"))


WRAPPERS = (compiled, in_parallel, with_a_compiled_child, with_a_checkpointed_child, twice)
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)


@every_wrapper
def test_wrapped_twin_is_saved_merged_removed_and_disabled(wrap: Callable[[nn.Module], nn.Module], tmp_path):
    expected, base, x = adapted()(given()), model()(given()), given()
    tuned = wrap(adapted())
    assert_close(tuned(x), expected)
    lora_fx.save(tuned, tmp_path)
    assert_close(lora_fx.load(model(), tmp_path)(x), expected)
    assert_close(lora_fx.merge(tuned)(x), expected)
    assert_close(lora_fx.remove(tuned)(x), base)
    with lora_fx.disabled(tuned):
        assert_close(tuned(x), base)
    assert len(list(lora_fx.parameters(tuned))) == 6
    assert len(lora_fx.inspect(tuned).sites) == 3
    assert len(lora_fx.deltas(tuned).sites) == 3


@every_wrapper
def test_file_of_a_wrapped_twin_is_that_of_the_twin_alone(wrap: Callable[[nn.Module], nn.Module], tmp_path):
    lora_fx.save(adapted(), tmp_path / "alone")
    lora_fx.save(wrap(adapted()), tmp_path / "wrapped")
    for file in (tmp_path / "alone").iterdir():
        assert (tmp_path / "wrapped" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("wrap", [with_a_compiled_child, with_a_checkpointed_child], ids=lambda wrap: wrap.__name__)
def test_file_is_loaded_into_a_model_with_wrapped_children(wrap: Callable[[nn.Module], nn.Module], tmp_path):
    lora_fx.save(adapted(), tmp_path)
    assert_close(lora_fx.load(wrap(model()), tmp_path)(given()), adapted()(given()))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.norm(self.first(x))))


PARTLY = {"version": 1, "rules": [{"match": {"name": "**", "op": "linear"}, "lora": {"r": 2}}], "train": ["**.norm"]}
PARTS = {"leaf": "0.first", "trained leaf": "0.norm", "block": "0"}


def around(module: nn.Module, path: str, wrap: str) -> nn.Module:
    """Return the model itself, with a wrapper around one of its modules."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    parent, _, name = path.rpartition(".")
    child = module.get_submodule(path)
    wrapped = checkpoint_wrapper(child) if wrap == "checkpointed" else torch.compile(child, backend="eager")
    setattr(module.get_submodule(parent), name, wrapped)
    return module


@pytest.mark.parametrize("wrap", ["compiled", "checkpointed"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.sampled(2)
def test_part_in_a_wrapper_is_trained_saved_merged_and_copied_as_without(part, when, wrap, tmp_path):
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Normed(), nn.Linear(6, 3)).eval()

    def gradients(tuned: nn.Module) -> dict[str, Tensor]:
        tuned(given()).square().sum().backward()
        return {without_wrappers(name): p.grad for name, p in tuned.named_parameters() if p.requires_grad}

    base, plain, x = made(), filled(lora_fx.apply(made(), PARTLY, (given(),))), given()
    model = around(made(), part, wrap) if when == "before" else made()
    tuned = filled(lora_fx.apply(model, PARTLY, (given(),)))
    tuned = around(tuned, part, wrap) if when == "after" else tuned
    expected = plain(x).detach()
    assert_close(tuned(x), expected)
    torch.testing.assert_close(gradients(tuned), gradients(plain), rtol=1e-5, atol=1e-5)
    assert_close(lora_fx.merge(tuned)(x), expected)
    assert_close(lora_fx.remove(tuned)(x), base(x))
    with lora_fx.disabled(tuned):
        assert_close(tuned(x), base(x))
    lora_fx.save(tuned, tmp_path / "wrapped")
    lora_fx.save(plain, tmp_path / "alone")
    tensors = "adapter_model.safetensors"
    assert load_file(tmp_path / "wrapped" / tensors).keys() == load_file(tmp_path / "alone" / tensors).keys()
    assert_close(lora_fx.load(made(), tmp_path / "wrapped")(x), expected)
    assert_close(lora_fx.load(around(made(), part, wrap), tmp_path / "alone")(x), expected)
    copied = copy.deepcopy(tuned)
    with torch.no_grad():
        for parameter in lora_fx.parameters(copied):
            parameter.add_(1)
    assert_close(tuned(x), expected)
    assert_close(lora_fx.merge(copied)(x), copied(x))


def test_file_of_a_model_with_a_part_in_parallel_fits_such_a_model_alone(tmp_path):
    def made() -> nn.Module:
        whole = model()
        whole[2] = nn.DataParallel(whole[2])
        return whole

    tuned = filled(lora_fx.apply(made(), RULES, (given(),)))
    lora_fx.save(tuned, tmp_path)
    assert_close(lora_fx.load(made(), tmp_path)(given()), tuned(given()))
    with pytest.raises(lora_fx.AdapterMismatchError, match=r"2\.module\.0 .*has no such linear"):
        lora_fx.load(model(), tmp_path)


@pytest.mark.parametrize("wrap", [compiled, in_parallel], ids=lambda wrap: wrap.__name__)
def test_wrapped_base_is_refused(wrap: Callable[[nn.Module], nn.Module]):
    with pytest.raises(lora_fx.RefusedError, match="adapt the model first"):
        lora_fx.apply(wrap(model()), RULES)


def test_peft_around_or_inside_is_refused():
    peft = pytest.importorskip("peft")
    inside = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["0"]))
    for held in (inside, inside.base_model.model):
        with pytest.raises(lora_fx.RefusedError, match=r"(holds adapters of PEFT|inside of PeftModel|PEFT holds)"):
            lora_fx.apply(held, RULES)
    with pytest.raises(lora_fx.RefusedError, match="PEFT cannot put adapters"):
        peft.get_peft_model(adapted(), peft.LoraConfig(r=2, target_modules=["3"]))


def test_names_without_wrappers():
    assert without_wrappers("_orig_mod.layers.0._checkpoint_wrapped_module.q") == "layers.0.q"
    assert without_wrappers("layers.my_orig_mod.q") == "layers.my_orig_mod.q"
    assert without_wrappers("a._orig_mod") == "a"


@pytest.mark.parametrize(
    ("how", "cache", "warned"), [("REENTRANT", True, 1), ("REENTRANT", False, 0), ("NO_REENTRANT", True, 0)]
)
def test_layers_that_would_meet_the_cache_they_have_filled_are_told_of(how, cache, warned):
    pytest.importorskip("transformers")
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    model = llama()
    model.config.use_cache = cache
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0], checkpoint_impl=CheckpointImpl[how])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        lora_fx.apply(
            model, {"version": 1, "rules": [{"match": {"name": "**.q_proj"}, "lora": {"r": 2}}]}, backend="modules"
        )
    told = [one for one in seen if "meet the cache" in str(one.message)]
    assert len(told) == warned
    assert all(one.filename == __file__ for one in told)
