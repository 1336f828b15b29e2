"""Rule files: what they mean, and every way in which one can be wrong, reported with line, column and a way out."""

from __future__ import annotations

import math
import os
import pickle
import re

import pytest

from lora_fx.errors import RuleError
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import Expect, LoRAConfig, RuleSet, Slice, Slices
from tests.planning.test_plan import golden

GOOD = """\
version: 1
defaults: {r: 4, alpha: 8}
rules:
  - name: attention
    match: {name: ["**.{q,v}_proj", "re:.*query"], op: linear, class: Linear}
    lora: {r: 16, dropout: 0.05, init: gaussian, rslora: true, adapter: style}
  - name: fused
    match: {name: "**.c_attn", shape: [3*d, d]}
    slices: {of: [q, k, v], adapt: [q, v]}
    expect: 12
  - match: {shape: [">=1024", "*"], op: [linear, matmul]}
    slices: {of: {q: 2048, kv: 1024}, adapt: [q]}
    expect: any
  - name: head
    match: {name: lm_head}
    skip: "tied to the token embedding"
train: ["classifier", "**.norm*"]
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "rules.yaml"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


def problems(text: str | bytes, written) -> list[tuple[int, int, str]]:
    with pytest.raises(RuleError) as caught:
        read_rules(written(text))
    return [(problem.line, problem.column, problem.message) for problem in caught.value.problems]


def test_good_file_means_what_it_says(written):
    rules = read_rules(written(GOOD))
    first, fused, third, head = rules.rules
    assert first.lora == LoRAConfig(r=16, alpha=8, dropout=0.05, init="gaussian", rslora=True, adapter="style")
    assert fused.lora == LoRAConfig(r=4, alpha=8)
    assert fused.slices == Slices((Slice("q"), Slice("k"), Slice("v")), ("q", "v"))
    assert fused.expect == Expect(12, 12)
    assert third.name == "rule 3"
    assert third.slices.parts == (Slice("q", 2048), Slice("kv", 1024))
    assert third.expect.accepts(0)
    assert (head.lora, head.skip) == (None, "tied to the token embedding")
    assert [trained.pattern.text for trained in rules.train] == ["classifier", "**.norm*"]
    assert str(first.span) == "rules.yaml:4"


def test_rules_survive_a_dict_and_pickle(written):
    rules = read_rules(written(GOOD))
    again = read_rules(rules.to_dict())
    assert again.to_dict() == rules.to_dict()
    assert [(r.name, r.match, r.lora, r.skip, r.slices, r.expect) for r in again.rules] == [
        (r.name, r.match, r.lora, r.skip, r.slices, r.expect) for r in rules.rules
    ]
    assert pickle.loads(pickle.dumps(rules)) == rules
    assert read_rules(rules) is rules


def test_explicit_rows_are_half_open_ranges():
    rules = {
        "version": 1,
        "rules": [
            {"match": {"name": "a"}, "slices": {"of": {"q": ["0..64", "192..256"], "k": "64..128"}, "adapt": ["q"]}}
        ],
    }
    (rule,) = read_rules(rules).rules
    assert rule.slices.parts == (Slice("q", None, ((0, 64), (192, 256))), Slice("k", None, ((64, 128),)))


@pytest.mark.parametrize(("config", "scaling"), [(LoRAConfig(8, 16), 2.0), (LoRAConfig(16, 8, rslora=True), 2.0)])
def test_scaling(config, scaling):
    assert config.scaling == scaling


def test_scalars_are_read_as_yaml_1_2_reads_them(written):
    text = "version: 1\nrules:\n  - {name: on, match: {name: yes}, lora: {r: 8, alpha: 1e+1, dropout: 1e-3}}\n"
    (rule,) = read_rules(written(text)).rules
    assert (rule.name, rule.match.name[0].text, rule.lora.alpha, rule.lora.dropout) == ("on", "yes", 10.0, 0.001)


def test_anchors_and_aliases_may_share_a_mapping(written):
    text = "version: 1\nrules:\n  - {match: {name: a}, lora: &small {r: 2}}\n  - {match: {name: b}, lora: *small}\n"
    assert [rule.lora.r for rule in read_rules(written(text)).rules] == [2, 2]


def test_explain_tells_why_a_site_does_not_match(written):
    first = read_rules(written(GOOD)).rules[0].match
    assert first.explain(("a.q_proj",), (4, 4), "linear", ("Linear",)) is None
    assert first.explain(("a.k_proj",), (4, 4), "linear", ("Linear",)).startswith("name a.k_proj does not match")
    assert first.explain(("a.q_proj",), (4, 4), "conv2d", ("Linear",)) == "op conv2d is not linear"
    assert first.explain(("a.q_proj",), (4, 4), "linear", ("Conv",)) == "class Conv does not match Linear"


# -- files that cannot be read


def test_missing_file_is_an_error_with_what_is_near(written):
    written(GOOD, "attention_rules.yaml")
    with pytest.raises(RuleError, match="no such file") as caught:
        read_rules("atention_rules.yaml")
    assert "did you mean attention_rules.yaml" in str(caught.value)
    assert "shipped: all-linear, attention, mlp, qkvo, wide" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "rules: the path of the rules is empty"),
        ("version: 1\nrules: []", "rules: this is the text of rules, not the path of a file"),
        (["rules"], "rules: rules must be a path, a shipped name, a dict or a RuleSet, not list"),
    ],
)
def test_what_is_neither_path_nor_rules_is_an_error(given, message):
    with pytest.raises(RuleError) as caught:
        read_rules(given)
    assert str(caught.value).splitlines()[0] == message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", (0, 0, "is empty")),
        (b"# only a comment\n", (0, 0, "is empty")),
        (b"\x00\x01\x02PK", (0, 0, "is a binary file, not YAML text")),
        (b"version: 1\n\xff\xfe\n", (2, 1, "is not UTF-8 text")),
        ('version: 1\nrules: ["\u00e9'.encode("latin-1"), (2, 10, "is not UTF-8 text")),
        ("version: 1\n".encode("utf-16"), (0, 0, "is UTF-16 text, not UTF-8")),
        (b"version: 1\nrules: 'a\x07b'\n", (2, 10, "the character U+0007 cannot stand in YAML text")),
        (b"version: 1\nrules: 'ab\n\n", (2, 8, "not valid YAML: found unexpected end of stream while scanning a quoted scalar")),
        (b"rules:\n\t- match: {}\n", (2, 1, "not valid YAML: found character that cannot start any token while scanning for the next token")),
        (b"version: 1\n---\nversion: 1\n", (2, 1, "a second document starts here; a rule file holds one")),
        (b"a: !!python/object/apply:os.system [ls]\n", (1, 4, "the tag !!python/object/apply:os.system is not allowed; rules are plain data")),
        (b"[" * 30, (1, 21, "nested deeper than 20 levels")),
        (b"a: *nowhere\n", None),
        (b"- 1\n- 2\n", (1, 1, "the rule file must be a mapping, found a list")),
        (b"just text\n", (1, 1, "the rule file must be a mapping, found the string 'just text'")),
    ],
    ids=["empty", "comment", "binary", "encoding", "latin-1", "utf-16", "control", "quote", "tab", "documents", "tag", "deep", "alias", "list", "text"],
)  # fmt: skip
def test_file_that_holds_no_rules_is_a_clear_error(content, expected, written):
    messages = problems(content, written)
    if expected is not None:
        assert messages[0] == expected


def test_very_deep_file_is_a_clear_error_whoever_sees_it_first(written):
    """libyaml, as PyYAML 6.0.4 brings it, has a limit of its own and looks ahead."""
    ((line, _, message),) = problems(b"[" * 100_000, written)
    assert line == 1
    assert re.search("nested deeper than 20 levels|flow level", message)


def test_tab_gets_a_hint(written):
    with pytest.raises(RuleError, match="a tab stands here; YAML is indented with spaces"):
        read_rules(written("rules:\n\t- match: {}\n"))


def test_unquoted_glob_gets_a_hint(written):
    with pytest.raises(RuleError, match=r'must be quoted: name: "\*\*\.q_proj"'):
        read_rules(written("version: 1\nrules:\n  - match: {name: **.q_proj}\n"))


def test_directory_is_an_error(tmp_path):
    with pytest.raises(RuleError, match="is a directory"):
        read_rules(tmp_path)


def test_huge_file_is_refused_without_reading_it(tmp_path, monkeypatch):
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(100 * 1024 * 1024)
    monkeypatch.setattr(os, "read", None)
    with pytest.raises(RuleError, match="has 104,857,600 bytes; at most 1,048,576 are read"):
        read_rules(path)


def test_alias_bomb_is_refused(written):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    messages = problems("\n".join(lines), written)
    assert messages[0][2] == "has more than 100,000 entries, aliases counted each time and long texts as several"


# -- rules that are wrong


RULE = "version: 1\nrules:\n  - match: {name: a}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("version: 2\nrules:\n  - match: {name: a}\n", (1, 10, "version must be 1, found the number 2")),
        ("version: true\nrules:\n  - match: {name: a}\n", (1, 10, "version must be 1, found the boolean true")),
        ("rules:\n  - match: {name: a}\n", (1, 1, "the rule file lacks 'version'")),
        ("version: 1\n", (1, 1, "the rule file lacks 'rules'")),
        ("version: 1\nrules: []\n", (2, 8, "rules is an empty list")),
        ("version: 1\nrules: {a: b}\n", (2, 8, "rules must be a list, found a mapping")),
        ("version: 1\nrules:\n  - name: a\n", (3, 5, "a rule lacks 'match'")),
        ("version: 1\nrules:\n  - match: {}\n", (3, 12, "match is empty")),
        (RULE + "    lora: {alhpa: 3}\n", (4, 12, "unknown key 'alhpa' in lora of rule 'rule 1'")),
        (RULE + "    lora: {r: 0}\n", (4, 15, "r must be at least 1, found 0")),
        (RULE + "    lora: {r: -3}\n", (4, 15, "r must be at least 1, found -3")),
        (RULE + '    lora: {r: "8"}\n', (4, 15, "r must be an integer, found the string '8'")),
        (RULE + "    lora: {r: 8.5}\n", (4, 15, "r must be an integer, found the number 8.5")),
        (RULE + "    lora: {r: true}\n", (4, 15, "r must be an integer, found the boolean true")),
        (RULE + "    lora: {r: 010}\n", (4, 15, "010 could be 10 or the octal number 010")),
        (RULE + "    lora: {alpha: 0}\n", (4, 19, "alpha must be at least 1e-09, found 0")),
        (RULE + "    lora: {alpha: 1e-300}\n", (4, 19, "alpha must be at least 1e-09, found 1e-300")),
        (RULE + "    lora: {alpha: 1e308}\n", (4, 19, "alpha must be at most 1000000000, found 1e+308")),
        (RULE + "    lora: {r: 65537}\n", (4, 15, "r must be at most 65536, found 65537")),
        (RULE + "    lora: {alpha: .nan}\n", (4, 19, "alpha must be finite, found nan")),
        (RULE + "    lora: {alpha: .inf}\n", (4, 19, "alpha must be finite, found inf")),
        (RULE + "    lora: {dropout: 1}\n", (4, 21, "dropout must be at least 0 and below 1, found 1")),
        (RULE + "    lora: {dropout: -0.1}\n", (4, 21, "dropout must be at least 0 and below 1, found -0.1")),
        (RULE + "    lora: {init: kaimng}\n", (4, 18, "init 'kaimng' is unknown")),
        (RULE + "    lora: {dora: yes}\n", (4, 18, "dora must be true or false, found the string 'yes'")),
        (RULE + "    lora: {adapter: a.b}\n", (4, 21, "adapter 'a.b' must be a name of letters, digits and _, a letter first")),
        (RULE + "    lora: {adapter: _a}\n", (4, 21, "adapter '_a' must be a name of letters, digits and _, a letter first")),
        (RULE + "    lora: 8\n", (4, 11, "lora of rule 'rule 1' must be a mapping, found the number 8")),
        (RULE + "    skip: true\n", (4, 11, "skip needs a reason")),
        (RULE + '    skip: ""\n', (4, 11, "skip is empty")),
        (RULE + "    expect: -1\n", (4, 13, "expect must be at least 0, found -1")),
        (RULE + "    expect: some\n", (4, 13, "expect must be an integer or any, found the string 'some'")),
        (RULE + "    match: {name: b}\n", (4, 5, "the key 'match' stands here twice, first in line 3")),
        (RULE + "    3: b\n", (4, 5, "a key must be a string, found the number 3")),
        (RULE + "    <<: {name: b}\n", (4, 5, "merge keys (<<) are not supported")),
        (RULE + "    slices: {of: [q, k], adapt: [v]}\n", (4, 34, "'v' is not a part")),
        (RULE + "    slices: {of: [q], adapt: [q]}\n", (4, 18, "of needs at least two parts")),
        (RULE + "    slices: {of: {q: 0..4, k: 2..6}, adapt: [q]}\n", (4, 18, "rows 2..4 belong to 'q' and 'k'")),
        (RULE + "    slices: {of: {q: 4..4, k: 4..6}, adapt: [q]}\n", (4, 22, "rows of 'q': the range 4..4 is empty (the end is not included)")),
        (RULE + "    slices: {of: {q: 4, k: 4..6}, adapt: [q]}\n", (4, 18, "give all parts a number of rows, or all of them ranges")),
        (RULE + "train: classifier\n", (4, 8, "train must be a list, found the string 'classifier'")),
        ("version: 1\nrules:\n  - match: {name: 3}\n", (3, 19, "name must be a string, found the number 3")),
        ("version: 1\nrules:\n  - match: {op: linaer}\n", (3, 17, "op 'linaer' is unknown")),
        ("version: 1\nrules:\n  - match: {shape: [0, 1]}\n", (3, 21, "a size in shape must be at least 1, found 0")),
        ("version: 1\nrules:\n  - match: {shape: [big]}\n", (3, 21, "`big` is not a size")),
        ('version: 1\nrules:\n  - match: {name: "a.{b"}\n', (3, 22, "name 'a.{b': `{` without `}`")),
        ("version: 1\nrules:\n  - match: {name: a..b}\n", (3, 21, "name 'a..b': the pattern has an empty segment")),
    ],
    ids=lambda value: value[2][:40] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_wrong_rule_is_reported_with_its_place(text, expected, written):
    assert problems(text, written) == [expected]


@pytest.mark.parametrize("name", ["train", "weight", "forward", "keys"])
def test_an_adapter_may_bear_a_name_that_modules_have_for_something_else(name, written):
    rules = read_rules(written(RULE + f"    lora: {{adapter: {name}}}\n"))
    assert rules.rules[0].lora.adapter == name


def test_lora_beside_skip_is_an_error(written):
    messages = problems(RULE + "    skip: because\n    lora: {r: 2}\n", written)
    assert messages == [(5, 11, "a rule that skips cannot have 'lora'")]


def test_names_are_unique(written):
    text = "version: 1\nrules:\n  - {name: a, match: {name: x}}\n  - {name: a, match: {name: y}}\n"
    assert problems(text, written) == [(4, 12, "the rule name 'a' is taken (line 3)")]


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(written):
    text = (
        "version: 2\n"
        "rules:\n"
        "  - name: attention\n"
        '    match: {name: "**.{q,v_proj"}\n'
        "    lora: {r: 8, alhpa: 16, dropout: 1.5}\n"
        "  - name: attention\n"
        '    match: {name: "a..b", op: linaer}\n'
        "    skip: true\n"
        "  - match: {shape: [3*d, foo]}\n"
        "    lora_alpha: 3\n"
    )
    with pytest.raises(RuleError) as caught:
        read_rules(written(text))
    golden("rule_errors.txt", str(caught.value))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("rank", "here it is called 'r'"),
        ("lora_alpha", "here it is called 'alpha'"),
        ("use_dora", "here it is called 'dora'"),
        ("droput", "did you mean 'dropout'?"),
        (
            "zzz",
            "allowed: r, alpha, dropout, share_dropout, init, rslora, dora, lora_fa, bias, share, divide_r, invocation, adapter",
        ),
    ],
)
def test_foreign_and_misspelt_keys_get_a_hint(key, hint, written):
    with pytest.raises(RuleError, match=hint.replace("?", r"\?")):
        read_rules(written(RULE + f"    lora: {{{key}: 3}}\n"))


@pytest.mark.parametrize("name", [r".*\.(q|v)_proj", ".*_proj$"])
def test_regular_expression_in_place_of_a_glob_gets_a_hint(name):
    with pytest.raises(RuleError, match=r"before a regular expression write re:"):
        read_rules({"rules": [{"match": {"name": name}}]})


def test_wrong_glob_is_not_taken_for_a_regular_expression():
    with pytest.raises(RuleError, match=r"empty segment\n  see: "):
        read_rules({"rules": [{"match": {"name": "a..q_proj"}}]})


def test_what_is_of_banks_alone_is_written_only_where_it_is_not_the_default():
    lora = {"r": 8, "alpha": 16, "dropout": 0.0, "init": "kaiming", "rslora": False, "dora": False, "bias": False}
    plain = lora | {"adapter": "default", "share_dropout": False, "lora_fa": False}
    for more in ({}, {"share": "B"}, {"divide_r": "experts"}, {"share": "outer", "divide_r": 4}):
        rules = read_rules({"rules": [{"match": {"name": "a"}, "lora": more}]})
        assert rules.rules[0].lora is not None
        assert rules.rules[0].lora.to_dict() == plain | more
        assert read_rules(rules.to_dict()).to_dict() == rules.to_dict()


# -- rules as a dict


def test_keys_of_peft_in_place_of_rules_get_a_hint():
    with pytest.raises(RuleError, match=r"'defaults\.r'[^$]*'defaults\.alpha'[^$]*'rules\[0\]\.match\.name'"):
        read_rules({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]})


def test_configuration_of_peft_in_place_of_rules_gets_a_hint():
    peft = pytest.importorskip("peft")
    with pytest.raises(RuleError, match=r"not LoraConfig\n  lora_fx\.rules_from_peft\(config, model\) makes rules"):
        read_rules(peft.LoraConfig(r=8))


def test_problem_in_a_dict_is_reported_with_its_path():
    with pytest.raises(RuleError) as caught:
        read_rules({"version": 1, "rules": [{"match": {"name": "a"}, "lora": {"r": "8"}}]})
    assert (
        str(caught.value)
        == "rules: rules[0].lora.r: r must be an integer, found the string '8'\n  take the quotes away"
    )


def cyclic() -> dict[str, object]:
    rules: dict[str, object] = {"version": 1}
    rules["rules"] = [rules]
    return rules


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (cyclic(), "nested deeper than 20 levels"),
        ({"version": 1, "rules": [{"match": {"name": ["a"] * 200_000}}]}, "more than 100,000 entries"),
        ({"version": 1, "rules": [{3: "a", "match": {"name": "a"}}]}, "a key must be a string"),
        ({"version": 1, "rules": [{"match": {"name": object()}}]}, "a value of type object cannot stand in rules"),
        ({"version": 1, "rules": [{"match": {"name": "a"}, "lora": {"alpha": math.nan}}]}, "alpha must be finite"),
        (7, "must be a path, a shipped name, a dict or a RuleSet, not int"),
        (None, "not NoneType"),
    ],
    ids=["cyclic", "large", "key", "object", "nan", "number", "none"],
)
def test_dict_that_holds_no_rules_is_a_clear_error(rules, message):
    with pytest.raises(RuleError, match=message):
        read_rules(rules)


def test_error_survives_pickle(written):
    with pytest.raises(RuleError) as caught:
        read_rules(written("version: 3\n"))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.problems) == (str(caught.value), caught.value.problems)


def test_ruleset_is_a_value():
    assert isinstance(read_rules("attention"), RuleSet)
    assert hash(read_rules("attention")) == hash(read_rules("attention"))
