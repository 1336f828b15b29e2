"""Bytes and FLOPs of a step on each device of a mesh, counted without allocating anything."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.bench.counters import flops, saved_bytes, tallied
from tests.support.clitools import SMALL, golden, run

ROWS, WIDE, INNER, RANK = 6, 8, 24, 3
RULES = {"version": 1, "rules": [{"name": "all", "match": {"name": "**.{up,down}"}, "lora": {"r": RANK, "alpha": 6}}]}
SPLIT = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDE, INNER), nn.Linear(INNER, WIDE)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDE, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def rows() -> tuple[torch.Tensor]:
    return (torch.randn(ROWS, WIDE),)


def counted(**options):
    return lora_fx.budget(Stack(), RULES, rows(), **options)


def test_one_device_takes_what_a_step_takes_here():
    budget, x = counted(), rows()
    tuned = lora_fx.apply(Stack(), RULES, x, backend="modules").train()

    def forward():
        return tuned(*x)[..., ::2].square().mean()

    forward().backward()
    trained = list(lora_fx.parameters(tuned))
    assert budget.adapters == budget.gradients == sum(p.nbytes for p in trained)
    assert budget.optimizer == 2 * budget.gradients
    assert budget.weights == sum(p.nbytes for p in tuned.parameters() if not p.requires_grad)
    assert budget.plain.flops == flops(lambda: forward().backward())
    handles = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in trained]
    assert budget.plain.peak == tallied(lambda: forward().backward()).peak
    assert budget.plain.kept == pytest.approx(saved_bytes(forward, [*tuned.parameters(), *x]), rel=0.02)
    assert budget.checkpointed.kept < budget.plain.kept < budget.plain.peak
    assert budget.checkpointed.flops > budget.plain.flops
    assert budget.gathered == 0
    assert len(handles) == len(trained)


def test_a_device_of_a_mesh_has_its_part_of_weights_and_of_what_lies_between_them():
    one, mesh = counted(), counted(mesh="dp=2,tp=4", tp_plan=SPLIT)
    bias = {"up": INNER, "down": WIDE}
    block = 2 * WIDE * INNER // 4 + bias["up"] // 4 + bias["down"]  # a process of tp
    halves = 2 * (INNER // 4 // 2 * WIDE + WIDE // 2 * INNER // 4) // 2 + bias["up"] // 4 // 2 + bias["down"] // 2
    head = 3 * WIDE + 3  # five rows over two: three
    assert mesh.weights == 4 * (3 * halves + head)
    A, B = {"up": RANK * WIDE, "down": RANK * INNER // 4}, {"up": INNER // 4 * RANK, "down": WIDE * RANK}
    padded = 2 * WIDE + 2 * INNER // 4 + INNER // 4 // 2 * RANK + WIDE // 2 * RANK  # three rows of A over two: two
    assert mesh.adapters == mesh.gradients == 4 * 3 * padded
    factors = sum(A.values()) + sum(B.values())
    assert mesh.gathered == 4 * (2 * (block + factors) + (WIDE * 5 + 5) + factors)
    between = 4 * ROWS * INNER  # the results of up and of silu, of which a device has a quarter
    assert one.plain.kept - mesh.plain.kept == pytest.approx(3 * 2 * between * 3 / 4, rel=0.05)
    products = 3 * 2 * (2 * 2 * ROWS * WIDE * INNER) - 2 * ROWS * WIDE * INNER
    assert one.plain.flops - mesh.plain.flops > products * 3 / 4


def test_a_stage_of_a_pipeline_has_its_blocks_and_the_micro_batches_that_are_on_their_way():
    one, piped = counted(), counted(mesh="pp=3", micro_batches=5)
    x, block, head = 4 * ROWS * WIDE, WIDE * INNER * 2 + INNER + WIDE, WIDE * 5 + 5
    assert [stage.weights for stage in piped.stages] == [4 * block, 4 * block, 4 * (block + head)]
    assert sum(stage.adapters for stage in piped.stages) == one.adapters
    assert sum(stage.plain.flops for stage in piped.stages) == 5 * one.plain.flops
    assert [stage.blocks for stage in piped.stages] == [1, 1, 1]
    first, middle, last = (stage.plain.kept for stage in piped.stages)
    buffers = 5 * x  # of what is received, and of gradients of what is sent
    own = (first - buffers) / 3  # three micro-batches are on their way
    assert own == (middle - 2 * buffers) / 2
    assert last - buffers > 0
    fewer = counted(mesh="pp=3", micro_batches=1)
    assert fewer.stages[0].plain.kept == own + x
    assert piped.total(piped.plain) == max(stage.total(stage.plain) for stage in piped.stages)
    assert counted(mesh="pp=3").micro_batches == 3
    assert counted(mesh="tp=4,pp=3", tp_plan=SPLIT).stages[0].weights < piped.stages[0].weights
    document = json.loads(piped.to_json())
    assert [stage["plain"]["kept"] for stage in document["stages"]] == [first, middle, last]
    for wrong, says in (
        ({"mesh": "pp=3", "micro_batches": 0}, "must be a whole number above 0"),
        ({"micro_batches": 2}, "has no pp"),
    ):
        with pytest.raises(ValueError, match=says):
            counted(**wrong)


def test_what_several_stages_use_each_has_and_blocks_out_of_order_are_no_pipeline():
    class Tied(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.ends = nn.Linear(WIDE, WIDE, bias=False)

        def forward(self, x):
            x = self.ends(x)
            for block in self.blocks:
                x = block(x)
            return x @ self.ends.weight

    class Backwards(Stack):
        def forward(self, x):
            for block in reversed(self.blocks):
                x = block(x)
            return x

    class Skips(Stack):
        def forward(self, x):
            skipped = self.blocks[0](x)
            return self.blocks[2](self.blocks[1](skipped) + skipped)

    first, middle, last = lora_fx.budget(Tied(), RULES, rows(), mesh="pp=3").stages
    assert first.weights - middle.weights == 4 * (WIDE * WIDE + WIDE * 5 + 5), "and the head that nobody uses"
    assert last.weights - middle.weights == 4 * WIDE * WIDE
    with pytest.raises(lora_fx.RefusedError, match=r"blocks\.2 +runs where blocks\.0 is next"):
        lora_fx.budget(Backwards(), RULES, rows(), mesh="pp=3")
    with pytest.raises(lora_fx.RefusedError, match=r"blocks\.2 +is given what the block before has not made"):
        lora_fx.budget(Skips(), RULES, rows(), mesh="pp=3")


def test_plans_and_dtypes_are_taken_and_the_model_stays_as_it_was():
    model, x = Stack().to("meta"), rows()
    plan = lora_fx.plan(model, RULES, x)
    half = lora_fx.budget(model, plan, x, dtype=torch.bfloat16, optimizer_states=1)
    assert half.dtypes == ("bfloat16",)
    assert half.adapters == half.optimizer == counted().adapters  # float32, as beside any base in half precision
    assert 2 * half.weights == counted().weights
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert lora_fx.Mesh.of({"dp": 2}) == lora_fx.Mesh(2) == lora_fx.Mesh.of("dp=2")
    document = json.loads(half.to_json())
    assert document["plain"]["total"] == half.total(half.plain)
    assert document["devices"] == 1


def test_a_step_of_training_fills_no_kv_cache_unless_it_is_asked_for():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    ids, rules = torch.arange(8).reshape(1, 8), {"rules": [{"match": {"name": "**.v_proj"}, "lora": {"r": 2}}]}
    with_cache, without, plain = (
        {"input_ids": ids, "labels": ids} | more for more in ({"use_cache": True}, {"use_cache": False}, {})
    )
    model = transformers.LlamaForCausalLM(config)
    said, quiet, asked = (lora_fx.budget(model, rules, given) for given in (without, plain, with_cache))
    assert said == quiet
    assert said.checkpointed.kept < asked.checkpointed.kept
    assert len(lora_fx.budget(model, rules, plain, mesh="pp=2").stages) == 2
    with pytest.raises(lora_fx.RefusedError, match="needs use_cache=False") as refused:
        lora_fx.budget(model, rules, with_cache, mesh="pp=2")
    assert str(refused.value).count("model.layers.1") == 1
    assert config.use_cache
    assert model.config is config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mesh": "dp=2,cp=2"}, "cp  is no axis that is counted here"),
        ({"mesh": "dp=2,pp=3"}, "stages that FSDP2 shards are not counted"),
        ({"mesh": "pp=2"}, "3 repeated blocks for pp=2"),
        ({"mesh": "dp=2,dp=4"}, "is there twice"),
        ({"mesh": "eight"}, "is not NAME=SIZE"),
        ({"mesh": {"dp": 0}}, "0 is no whole number above 0"),
        ({"mesh": 8}, "mesh  is 8"),
        ({"mesh": "tp=2"}, "brings no plan of tensor parallelism"),
        ({"mesh": "dp=2", "tp_plan": SPLIT}, "needs a mesh with tp"),
        ({"mesh": "tp=2", "tp_plan": {"blocks.*.up": "sequence_parallel"}}, "styles that are not counted"),
        ({"mesh": "tp=2", "tp_plan": {"blocks.*.middle": "colwise"}}, "matches no module and no parameter"),
        ({"mesh": "tp=2", "tp_plan": {"blocks.{": "colwise"}}, "cannot be read"),
        ({"mesh": "tp=2", "tp_plan": {"blocks.0": "colwise"}}, "colwise is not for Block"),
        ({"mesh": "tp=5", "tp_plan": SPLIT}, "24 outputs do not divide by tp=5"),
    ],
)
def test_what_is_not_counted_is_refused_by_name(options, says):
    with pytest.raises(lora_fx.RefusedError, match=says.replace("(", r"\(")):
        counted(**options)


def test_models_that_cannot_be_counted_are_refused_by_name():
    class Asks(Stack):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    quantised = Stack()
    quantised.head.weight = nn.Parameter(torch.zeros(5, WIDE, dtype=torch.int8), requires_grad=False)
    for model, says in (
        (torch.fx.symbolic_trace(nn.Sequential(nn.Linear(WIDE, 5))), "GraphModule"),
        (quantised, "head.weight  is quantised"),
        (Asks(), "does not run on the meta device"),
    ):
        with pytest.raises(lora_fx.RefusedError, match=says):
            lora_fx.budget(model, RULES, rows())
    with pytest.raises(lora_fx.RefusedError, match="no inputs"):
        lora_fx.budget(Stack(), RULES)
    sliced = {**RULES, "rules": [{**RULES["rules"][0], "slices": {"of": ["a", "b"], "adapt": ["a"]}}]}
    with pytest.raises(lora_fx.RefusedError, match="slices"):
        lora_fx.budget(Stack(), sliced, rows(), mesh="tp=2", tp_plan=SPLIT)
    with pytest.raises(ValueError, match="optimizer_states"):
        counted(optimizer_states=-1)


def test_offloaded_weights_are_refused_by_name():
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(lora_fx.RefusedError, match=r"blocks\.0\.up +is offloaded"):
        lora_fx.budget(accelerate.cpu_offload(Stack(), execution_device="cpu"), RULES, rows())


def test_the_command_prints_a_table_or_json_and_refuses_what_does_not_go_together(tmp_path):
    asked = ("plan", SMALL, "attention", "--mesh", "dp=4,tp=2", "--split", "layers.*.{q,k}_proj=colwise_gather_output")
    golden("plan-mesh-60.txt", run(*asked, columns=60).output)
    assert json.loads(run(*asked, "--format", "json").output)["mesh"] == {"dp": 4, "tp": 2, "pp": 1}
    for more, says in (
        (("--format", "dot"), "as text or json"),
        (("--stat",), "leave out --all, --stat and --expect"),
        (("--tokens", "two"), "write batch and length as 1x2048"),
        (("--tokens", "1x8"), "models of transformers"),
        (("--split", "colwise"), "write GLOB=STYLE"),
    ):
        result = run(*asked, *more)
        assert result.exit_code == 2 or says in result.output
        assert says in result.output
    shown = run("plan", SMALL, "attention", "--mesh", "pp=3", "--micro-batches", "4", columns=80)
    golden("plan-mesh-stages-80.txt", shown.output)
    assert "is for pp" in run(*asked, "--micro-batches", "4").output
    assert "are for --mesh" in run("plan", SMALL, "attention", "--dtype", "float16").output
    assert "RULES are missing" in run("plan", "saved.json", "--mesh", "dp=2").output
