"""draft_rules: the first rule file for a model, each part of which is tried by planning with it."""

from __future__ import annotations

import random
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lora_fx
from lora_fx.discovery.study import observed
from lora_fx.models.samples import samples_for
from lora_fx.planning.decide import decide
from lora_fx.planning.draft.covering import covering
from lora_fx.planning.draft.rows import MOST_ROWS
from lora_fx.rules.lint import lint
from lora_fx.rules.patterns import NamePattern
from lora_fx.rules.reader import read_rules
from lora_fx.rules.writing import quoted
from lora_fx.text import scaled
from tests.support.compoundkinds import ATTENTION, EXPERTS
from tests.support.drafts import parts_of, switched_on
from tests.support.zoo import ZOO, Encoder, Gpt, Mlp
from tests.whole.test_odd_names import hidden_in, odd_names

transformers = pytest.importorskip("transformers")
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def checked(model: nn.Module, folder, inputs: object = None) -> str:
    """Return the draft for a model, after its rule and every part of it were planned with as they are said."""
    text = lora_fx.draft_rules(model, inputs)
    path = folder / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    assert lint(path)[1] == []
    plan = lora_fx.plan(model, path, inputs)
    inventory = observed(model, samples_for(model, inputs)).inventory
    assert plan.adapted
    said = re.search(r"^  ## ([\d,]+) of ([\d,]+) parameters", text, re.MULTILINE)
    assert said is not None
    assert [int(number.replace(",", "")) for number in said.groups()] == [plan.trainable, plan.total]
    for part in parts_of(text):
        path.write_text(switched_on(text, part), encoding="utf-8")
        with_part = decide(read_rules(path), inventory)  # what `plan` decides, before it captures anything
        if part.instead:
            assert with_part.trainable == part.said, part.name
            assert not with_part.refused
        elif part.said is not None:
            rest = {site.path for site in plan.adapted}
            assert sum(site.trainable for site in with_part.adapted if site.path not in rest) == part.said, part.name
    return text


def names_of(text: str) -> list[str]:
    return [part.name for part in parts_of(text)]


def active(text: str) -> list[str]:
    return yaml.safe_load(text)["rules"][0]["match"]["name"]


# -- models


@pytest.mark.parametrize("specimen", ZOO, ids=lambda specimen: specimen.name)
@pytest.mark.parametrize("with_inputs", [False, True], ids=["alone", "inputs"])
def test_every_part_of_the_draft_for_a_small_model_can_be_switched_on(specimen, with_inputs, tmp_path):
    model = specimen.build()
    inputs = specimen.sample() if with_inputs else None
    assert checked(model, tmp_path, inputs) == lora_fx.draft_rules(model, inputs)


@pytest.mark.parametrize("kind", [*ATTENTION[:2], ATTENTION[-1], *EXPERTS[:4]], ids=lambda kind: kind.name)
def test_every_part_of_the_draft_for_raw_parameters_can_be_switched_on(kind, tmp_path):
    checked(kind.build(), tmp_path, kind.sample())


CONFIGS = {
    "llama": lambda: (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SMALL)),
    "gpt2": lambda: (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=32),
    ),
    "bert": lambda: (transformers.BertForSequenceClassification, transformers.BertConfig(**SMALL)),
    "t5": lambda: (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=64),
    ),
    "mixtral": lambda: (transformers.MixtralForCausalLM, transformers.MixtralConfig(**SMALL, num_local_experts=4)),
    "mamba": lambda: (
        transformers.MambaForCausalLM,
        transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64),
    ),
    "resnet": lambda: (
        transformers.ResNetForImageClassification,
        transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2]),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_part_of_the_draft_for_a_model_of_transformers_without_weights_can_be_switched_on(name, tmp_path):
    kind, config = CONFIGS[name]()
    with torch.device("meta"):
        model = kind(config)
    checked(model, tmp_path)


def test_draft_for_a_llama_takes_the_linears_of_its_blocks_and_offers_the_rest():
    kind, config = CONFIGS["llama"]()
    text = lora_fx.draft_rules(kind(config))
    assert active(text) == ["model.layers.*.self_attn.{q,k,v,o}_proj", "model.layers.*.mlp.{gate,up,down}_proj"]
    assert names_of(text) == [
        "dropout", "rslora", "dora", "expect", "query-value", "attention", "mlp", "head", "embeddings", "train",
    ]  # fmt: skip
    assert "##   ·  embedding  model.embed_tokens " in text


def test_draft_adapts_the_parts_of_a_fused_weight_where_the_thirds_are_known(tmp_path):
    text = checked(Gpt(), tmp_path)
    assert "  #   slices:\n  #     of: [q, k, v]\n  #     adapt: [q, v]\n" in text
    assert "tied to wte.weight" in text
    assert not re.search(r"^#   - .*lm_head", text, re.MULTILINE)  # tied: not to be trained alone


def test_draft_offers_what_peft_adapts_in_models_of_the_type(tmp_path):
    kind, config = CONFIGS["gpt2"]()
    gpt2 = lora_fx.draft_rules(kind(config))
    assert "peft-default" in names_of(gpt2)
    (part,) = (part for part in parts_of(gpt2) if part.name == "peft-default")
    (tmp_path / "rules.yaml").write_text(switched_on(gpt2, part), encoding="utf-8")
    theirs = lora_fx.rules_from_peft({"r": 8}, kind(config))  # no target_modules: PEFT's own for the type
    ours, of_peft = (lora_fx.plan(kind(config), rules) for rules in (tmp_path / "rules.yaml", theirs))
    assert [(site.path, site.lora) for site in ours.adapted] == [(site.path, site.lora) for site in of_peft.adapted]
    kind, config = CONFIGS["llama"]()
    assert "PEFT has these by default for `llama`." in lora_fx.draft_rules(kind(config))  # the query and value
    assert "PEFT" not in lora_fx.draft_rules(Mlp(32))


def test_draft_leaves_out_what_is_narrower_than_the_rank_and_says_so(tmp_path):
    model = nn.ModuleList(nn.ModuleDict({"wide": nn.Linear(32, 32), "thin": nn.Linear(32, 3)}) for _ in range(2))
    text = checked(model, tmp_path)
    assert active(text) == ["*.wide"]
    assert "narrower than r = 16" in text


def test_draft_for_a_convolutional_model_offers_its_linear_layers_and_no_shared_ones(tmp_path):
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 5)]
    text = checked(nn.Sequential(*layers), tmp_path)
    assert "shared-linears" not in names_of(text)
    assert "All layers.  What is narrower than r is left out." in text
    assert "The linear layers alone." in text


def test_draft_lowers_the_rank_where_all_is_narrow(tmp_path):
    text = checked(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), tmp_path)
    assert yaml.safe_load(text)["rules"][0]["lora"] == {"r": 4, "alpha": 8}


def test_draft_leaves_routers_alone_and_offers_them():
    kind, config = CONFIGS["mixtral"]()
    text = lora_fx.draft_rules(kind(config))
    assert "router" in text
    assert not any("gate.weight" in name or name.endswith(".gate") for name in active(text))


def test_draft_says_what_cannot_be_adapted_and_why(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "up": nn.ConvTranspose1d(16, 16, 3)})
    text = checked(model, tmp_path)
    assert "## What cannot be adapted, and why:" in text
    assert "transposed convolutions cannot be adapted" in text


def test_model_of_which_nothing_can_be_adapted_is_an_error_with_every_reason():
    with pytest.raises(lora_fx.RefusedError, match="has no weight that can be adapted") as refused:
        lora_fx.draft_rules(nn.ModuleDict({"up": nn.ConvTranspose1d(4, 4, 3)}))
    assert [path for path, _ in refused.value.refusals] == ["up"]
    with pytest.raises(lora_fx.RefusedError, match="no weight that multiplies"):
        lora_fx.draft_rules(nn.LayerNorm(3))


def test_model_that_is_a_layer_itself_gets_a_rule(tmp_path):
    checked(nn.Linear(16, 16), tmp_path)


def test_draft_for_hundreds_of_different_layers_stays_short(tmp_path):
    named = nn.ModuleDict({f"part_{chr(97 + k % 26)}{k}": nn.Linear(16, 16 + k) for k in range(300)})
    deep = nn.ModuleDict({f"p{k}x": nn.ModuleDict({"proj": nn.Linear(16, 16 + k)}) for k in range(300)})
    for model in (named, deep, nn.ModuleDict({"a": named, "b": deep, "head": nn.Embedding(16, 16)})):
        text = checked(model, tmp_path)
        assert len(text.splitlines()) < 3 * MOST_ROWS
        assert max(map(len, text.splitlines())) < 200


def test_draft_is_the_same_for_a_model_without_values(tmp_path):
    with torch.device("meta"):
        blank = Encoder()
    assert lora_fx.draft_rules(blank) == lora_fx.draft_rules(Encoder())


def test_model_stays_as_it_is():
    model = Mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora_fx.draft_rules(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


# -- names of others


@pytest.mark.parametrize("seed", range(4))
def test_draft_for_odd_names_shows_nothing_that_is_not_seen_and_can_be_read(seed, tmp_path):
    names = odd_names(12, seed)
    model = nn.ModuleList(nn.ModuleDict({name: nn.Linear(16, 16) for name in names}) for _ in range(2))
    text = checked(model, tmp_path)
    assert not hidden_in(text)
    assert len(lora_fx.plan(model, tmp_path / "rules.yaml").adapted) == 24


@pytest.mark.parametrize(
    "name", ["a#b", " # b", "a: b", "- a", "a\nrules: []", "*", "**", "{a,b}", "[a]", "re:a", "?", "\\", '"', "'", "\ufffe",
             "\U0001f600", "\ud800", "\0", "é", "!x", "&a", "~", "null", "0x1", "00", "٣", "{0,3}", "q", "yes"],
    ids=ascii,
)  # fmt: skip
def test_rule_for_an_odd_name_matches_it_and_not_its_neighbour(name, tmp_path):
    model = nn.ModuleDict({name: nn.Linear(16, 16), "lm_head": nn.Linear(16, 16), "plain": nn.Embedding(16, 16)})
    text = checked(model, tmp_path)
    (tmp_path / "rules.yaml").write_text(text, encoding="utf-8")
    assert [site.path for site in lora_fx.plan(model, tmp_path / "rules.yaml").adapted] == [name]


def test_class_with_an_odd_name_stays_in_its_line(tmp_path):
    model = type("A\nrules: []\x1b", (Mlp,), {})()
    assert "Rules for A\\nrules: []\\x1b" in checked(model, tmp_path)


@pytest.mark.parametrize("seed", range(30))
def test_globs_cover_what_they_shall_and_nothing_else(seed):
    draw = random.Random(seed)
    words = ["a", "b", "q_proj", "k_proj", "0", "1", "2", "11", "00", "x", "to_q", "to_k", "", "h*", "{z}"][:14]
    known = {".".join(draw.choice(words) or "e" for _ in range(draw.randint(1, 4))) for _ in range(draw.randint(2, 60))}
    chosen = sorted(name for name in known if draw.random() < draw.choice([0.2, 0.5, 0.9]))
    others = sorted(known - {*chosen})
    patterns = [NamePattern(glob) for glob in covering(chosen, others, draw.choice([0, 3, 16]))]
    assert [name for name in sorted(known) if any(pattern.matches(name) for pattern in patterns)] == chosen


@pytest.mark.parametrize(
    ("chosen", "others", "globs"),
    [
        (["h.0.q", "h.1.q"], [], ["h.*.q"]),
        (["h.0.q"], ["h.1.k"], ["h.0.q"]),
        (["h.0.q", "h.1.q", "h.2.q"], ["h.3.q"], ["h.{0..2}.q"]),
        (["h.0.q", "h.2.q", "h.x.q"], ["h.1.q"], ["h.{0,2}.q", "h.x.q"]),
        (["h.0.q_proj", "h.0.v_proj"], ["h.0.k_proj"], ["h.0.{q,v}_proj"]),
        (["a.to_q", "a.to_v", "b.to_q"], [], ["a.to_{q,v}", "b.to_q"]),
        (["s.0.0", "s.1.1"], ["s.0.1", "s.1.0"], ["s.0.0", "s.1.1"]),
        ([""], ["a"], ["re:^$"]),
    ],
)
def test_globs_are_those_that_people_would_write(chosen, others, globs):
    assert list(covering(chosen, others)) == globs


def test_many_names_are_told_by_their_ends():
    chosen = [f"part{chr(97 + k)}.x.q_proj" for k in range(20)]
    assert covering(chosen, ["other.k_proj"]) == ("**.q_proj",)
    assert covering(chosen, ["other.q_proj"]) == ("**.x.q_proj",)


@pytest.mark.parametrize(
    "text", ["a", 'a"b\\c', "\n\t\0\x7f\x85", "\u2028\u202e\ufeff\ufffe", "\U0001f600\U000e0041", "漢"]
)
def test_quoted_text_is_read_back_as_it_was(text):
    assert yaml.safe_load(quoted(text)) == text
    assert quoted(text).isprintable()


def test_layers_of_a_detection_head_are_in_no_block(tmp_path):
    model = nn.ModuleDict(
        {"layers": nn.ModuleList(Mlp() for _ in range(2)), "box": nn.ModuleList([nn.Linear(16, 16)] * 2)}
    )
    assert active(checked(model, tmp_path)) == ["layers.*.{fc1,fc2}"]


@pytest.mark.slow
def test_experts_can_be_left_out(tmp_path):
    kind, config = CONFIGS["mixtral"]()
    text = checked(kind(config), tmp_path)
    part = next(part for part in parts_of(text) if part.name == "attention")
    assert "experts" not in switched_on(text, part).split("- name: attention")[1].split("lora:")[0]
    kind, config = transformers.JambaForCausalLM, transformers.JambaConfig(
        **SMALL, num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        use_mamba_kernels=False,
    )  # fmt: skip
    assert "shared-linears" in names_of(checked(kind(config), tmp_path))


def test_numbers_at_the_beginning_of_an_end_are_not_all_that_is_told():
    chosen = [f"part{chr(97 + k)}.to_out.0" for k in range(20)]
    assert covering(chosen, []) == ("**.to_out.0",)


def _saved_numbers(folder) -> int:
    return sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())


def _grouped() -> nn.Module:
    return nn.ModuleList(nn.ModuleDict({"conv": nn.Conv2d(32, 32, 3, groups=2)}) for _ in range(2))


@pytest.mark.parametrize("make", [Gpt, Encoder, _grouped, lambda: CONFIGS["llama"]()[0](CONFIGS["llama"]()[1])])
def test_bytes_are_those_of_the_file_that_is_saved(make, tmp_path):
    model = make()
    text = lora_fx.draft_rules(model)
    lines = text.splitlines()
    for part in parts_of(text):
        if part.said is None:
            continue
        rules = yaml.safe_load(switched_on(text, part))["rules"]
        only = {"rules": [rule for rule in rules if rule["name"] not in ("linears", "convolutions")]}
        lora_fx.save(lora_fx.apply(model, only, backend="modules"), tmp_path / part.name)
        said = next(lines[at] for at in range(part.lines[0], 0, -1) if " in float32" in lines[at])
        assert f", {scaled(4 * _saved_numbers(tmp_path / part.name), 'B')} in float32" in said, part.name


class _Moe(nn.Module):
    """Experts as modules of a list, and the linear that chooses among them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.attn = nn.Linear(32, 8), nn.ModuleDict({"q_proj": nn.Linear(32, 32)})
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(32, 32)}) for _ in range(8))


def test_experts_in_a_list_are_told_as_such_and_the_router_is_offered(tmp_path):
    text = checked(nn.ModuleDict({"layers": nn.ModuleList(_Moe() for _ in range(2))}), tmp_path)
    assert active(text) == ["layers.*.attn.q_proj", "layers.*.experts.*.w1"]
    rows = {tuple(line.split()[1:5]) for line in text.splitlines() if line.startswith("##   ")}
    assert {("+", "experts", "layers.*.experts.*.w1", "×16"), ("·", "router", "layers.*.gate", "×2")} <= rows
    assert {"query-value", "routers"} <= {*names_of(text)}
    assert "FLOPs" not in next(
        line for line in text.splitlines() if " in float32" in line
    )  # not one row for each expert


def test_flops_are_those_that_torch_counts_for_parts_of_fused_weights_too():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn, self.o_proj = nn.Linear(64, 192), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.o_proj(self.c_attn(x)[..., -64:])

    model = nn.Sequential(Block(), Block())

    def flops(run: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            run(torch.ones(5, 64))
        return counter.get_total_flops()

    text = lora_fx.draft_rules(model)
    said = re.findall(r"[+]([0-9.]+) % FLOPs in these layers", text)
    parts = {"of": ["q", "k", "v"], "adapt": ["q", "v"]}
    offers = [("*.c_attn", 8, {"slices": parts}, 2 * 2 * 5 * 64 * 192), ("*.*", 16, {}, flops(model))]
    for name, r, more, base in offers:
        tuned = lora_fx.apply(model, {"rules": [{"match": {"name": name}, "lora": {"r": r}, **more}]})
        assert f"{100 * (flops(tuned) - flops(model)) / base:.0f}" in said
