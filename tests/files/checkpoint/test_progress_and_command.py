"""A streaming merge tells how far it is, and is a command."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import lora_fx
from lora_fx import merge_checkpoint
from tests.support.merging import (
    Q,
    contents,
    factors,
    write_adapter,
)

# -- progress and the command line


@pytest.mark.parametrize("out_dtype", [None, "float32"])
def test_progress_ends_with_all_bytes(tmp_path, sharded, adapter, out_dtype):
    told = []
    merge_checkpoint(
        sharded, adapter, tmp_path / "out", out_dtype=out_dtype, progress=lambda *event: told.append(event)
    )
    total = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert told[-1][:2] == (total, total)
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)


def run(*words: object):
    return CliRunner().invoke(lora_fx.cli.main, [str(word) for word in words])


@pytest.fixture(autouse=True)
def _cli():
    import lora_fx.cli  # noqa: F401


def test_command_merges_and_tells_what_it_did(tmp_path, base, adapter):
    result = run("merge", base, adapter, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == f"{tmp_path / 'out'}: 2 merged, 3 untouched"
    assert "survived" in result.stdout
    merge_checkpoint(base, adapter, tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_command_gives_json_and_takes_several_adapters(tmp_path, base, adapter):
    second = write_adapter(tmp_path / "second", factors(Q, 48, 48))
    result = run("merge", base, adapter, second, "-o", tmp_path / "out", "--format", "json", "--no-progress")
    assert result.exit_code == 0, result.output
    assert [len(row["adapters"]) for row in json.loads(result.stdout)["tensors"]] in ([2, 1], [1, 2])
    assert result.stderr == ""


def test_command_tells_what_is_wrong_and_ends_with_2(tmp_path, base, adapter):
    result = run("merge", base, tmp_path / "none", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "adapter_config.json: does not exist" in result.stderr
    assert "Traceback" not in result.stderr
