"""What is kept of frozen blocks: rows or calls, as long as there is room, and no longer than the context."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.errors import RefusedError
from lora_fx.regions.prefix.blocks import KeptBlock
from tests.support.prefixes import (
    LENGTH,
    ROWS,
    adapted,
    assert_bits,
    data,
    llama,
    rows,
    shuffled,
    stacked,
    trained,
)

# -- rows and calls


def test_blocks_that_mix_rows_are_kept_as_whole_calls() -> None:
    def mixes(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) - x.mean(0)

    tuned = stacked(mixes, None)
    x = torch.randn(4, 8)
    with lora_fx.cached_prefix(tuned) as cache:
        first = tuned(x)
        assert_bits([tuned(x)], [first])
        other = tuned(x.flip(0))
        assert (cache.report.hits, cache.report.misses, cache.report.whole_calls) == (4, 8, 8)
    assert_bits([other], [tuned(x.flip(0))])


def test_what_later_blocks_write_to_is_not_what_is_kept() -> None:
    tuned = stacked(None, None, between=lambda x: x.mul_(2))
    alone = copy.deepcopy(tuned)
    x = torch.randn(4, 8)
    with lora_fx.cached_prefix(tuned) as cache:
        for _ in range(3):
            assert_bits([tuned(x)], [alone(x)])
    assert cache.report.hits > 0


def test_who_reads_between_two_blocks_gets_it_computed() -> None:
    seen: list[float] = []
    tuned = stacked(None, None, None, between=lambda x: seen.append(float(x.detach().sum())) or x)
    x = torch.randn(4, 8)
    with lora_fx.cached_prefix(tuned) as cache:
        tuned(x)
        tuned(x)
    half = len(seen) // 2
    assert seen[:half] == seen[half:]
    assert cache.report.asked > 0


def test_arguments_of_later_blocks_count() -> None:
    given: list[torch.Tensor] = []

    def adds(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.linear(x)) + given[0].sum()

    tuned = stacked(None, adds)
    x = torch.randn(4, 8)
    with lora_fx.cached_prefix(tuned) as cache:
        for value in (1.0, 2.0, 2.0):
            given[:] = [torch.full((2,), value)]
            found = tuned(x)
    assert cache.report.hits == 0  # such a forward has no graph
    assert_bits([found], [tuned(x)])


# -- room


@pytest.mark.slow
def test_what_has_no_room_is_computed() -> None:
    batches = shuffled(3)
    expected, tuned = trained(adapted(llama()), batches), adapted(llama())
    with lora_fx.cached_prefix(tuned, capacity=4 * LENGTH * 32 * 4) as cache:
        assert_bits(trained(tuned, batches), expected)
        assert (cache.report.kept, cache.report.bytes) == (4, 4 * LENGTH * 32 * 4)
        assert cache.report.hits == 2 * 4  # the same four rows in each epoch
        cache.clear()
        assert cache.report.kept == 0
    assert cache.report.left_out > 0


@pytest.mark.slow
def test_a_directory_serves_the_next_run(tmp_path) -> None:
    batches = shuffled(2)
    expected, tuned = trained(adapted(llama()), batches), adapted(llama())
    with lora_fx.cached_prefix(tuned, capacity=0, directory=tmp_path / "kept") as cache:
        trained(tuned, batches[:3])
        assert (cache.report.kept, cache.report.misses) == (0, ROWS)
    files = sorted((tmp_path / "kept").rglob("*.safetensors"))
    assert len(files) == ROWS
    files[0].write_bytes(files[0].read_bytes()[:-4])
    damaged = bytearray(files[1].read_bytes())
    damaged[-1] ^= 1
    files[1].write_bytes(damaged)
    again = adapted(llama())
    with lora_fx.cached_prefix(again, directory=tmp_path / "kept") as cache:
        assert_bits(trained(again, batches), expected)
    assert cache.report.misses >= 2
    assert cache.report.hits + cache.report.misses == 2 * ROWS
    assert cache.report.hits >= ROWS
    assert all(path.stat().st_size for path in files)


def test_a_directory_that_cannot_be_written_to_is_told(tmp_path) -> None:
    tuned = adapted(llama())
    (tmp_path / "kept").mkdir()
    with lora_fx.cached_prefix(tuned, directory=tmp_path / "kept") as cache:
        for number in range(256):
            (tmp_path / "kept" / f"{number:02x}").write_text("in the way")
        with pytest.warns(lora_fx.LoraFxWarning, match="cannot be written to"):
            tuned(**rows([0, 1]))
        tuned(**rows([0, 1]))
    assert cache.report.hits == 2


# -- around


@pytest.mark.slow
def test_copies_and_files_of_the_model_have_nothing_of_it() -> None:
    tuned = adapted(llama())
    with lora_fx.cached_prefix(tuned):
        loss = tuned(**rows([0, 1])).loss
        copies = [copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))]
        merged = lora_fx.merge(tuned)
    for other in copies:
        assert lora_fx.inspect(other).prefix is None
        assert_bits([other(**rows([0, 1])).loss], [loss])
        with lora_fx.cached_prefix(other) as cache:
            other(**rows([0, 1]))
            other(**rows([0, 1]))
        assert cache.report.hits == 2
    assert not any(isinstance(module, KeptBlock) for module in (*tuned.modules(), *merged.modules()))


def test_threads_share_what_is_kept() -> None:
    tuned = adapted(llama()).eval()
    with torch.no_grad():
        expected = [tuned(**rows([row])).loss for row in range(ROWS)]
    found: dict[tuple[int, int], torch.Tensor] = {}

    def work(number: int) -> None:
        with torch.no_grad():
            for row in range(ROWS):
                found[number, row] = tuned(**rows([row])).loss

    with lora_fx.cached_prefix(tuned) as cache:
        work(-1)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for (_, row), loss in found.items():
        assert_bits([loss], [expected[row]])
    assert cache.report.hits == 4 * ROWS


def test_inspect_tells_and_the_model_is_left_as_it_was() -> None:
    tuned = adapted(llama())
    before = lora_fx.inspect(tuned)
    with lora_fx.cached_prefix(tuned) as cache:
        tuned(**rows([0, 1]))
        tuned(**rows([1, 0]))
        told = lora_fx.inspect(tuned)
        assert told.prefix == cache.report
        assert told.prefix.blocks == ("model.layers.0", "model.layers.1")
        assert "model.layers.{0..1}  ×2  kept: 2 outputs, 3,072 B  rows: 2 hits, 2 computed" in str(told)
    after = lora_fx.inspect(tuned)
    assert after.prefix is None
    assert [region.path for region in after.regions] == [region.path for region in before.regions]
    assert type(tuned.model.layers[0]) is type(llama().model.layers[0])


def test_what_cannot_be_is_refused_before_anything_changes() -> None:
    everywhere = lora_fx.apply(llama(), r=4)
    with pytest.raises(RefusedError, match="no block lies below"), lora_fx.cached_prefix(everywhere):
        pass
    with pytest.raises(RefusedError, match="not adapted"), lora_fx.cached_prefix(llama()):
        pass
    tuned = adapted(llama())
    with pytest.raises(ValueError, match="number of bytes"), lora_fx.cached_prefix(tuned, capacity=-1):
        pass
    with (
        lora_fx.cached_prefix(tuned),
        pytest.raises(RefusedError, match="kept already"),
        lora_fx.cached_prefix(tuned),
    ):
        pass
    assert data()["labels"].shape == (ROWS, LENGTH)
