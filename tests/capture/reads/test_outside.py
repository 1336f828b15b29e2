"""What a forward reads outside of its module is guarded: globals, closures, defaults, flags, the environment."""

from __future__ import annotations

import math
import os
import random
import time

import numpy as np
import torch

from tests.support.capturing import Block, captured, put, refusal, told_after, x

SCALE = 2.0
SCALES = [2.0]
COUNTS = {"calls": 0}
GENERATOR = random.Random(0)


def scaled(value, factor=2.0):
    return value * SCALE * factor


def test_global_of_a_function_that_the_forward_calls_is_guarded(monkeypatch):
    module = Block(lambda self, x: scaled(self.first(x)))
    told = told_after(module, lambda: monkeypatch.setitem(globals(), "SCALE", 3.0))
    assert told == "value of SCALE"


def test_global_list_changed_in_place_is_seen(monkeypatch):
    monkeypatch.setitem(globals(), "SCALES", [2.0])
    module = Block(lambda self, x: self.first(x) * SCALES[0])
    assert told_after(module, lambda: SCALES.append(1.0)) == "value of SCALES"


def test_function_that_is_replaced_is_seen(monkeypatch):
    module = Block(lambda self, x: scaled(self.first(x)))
    assert told_after(module, lambda: monkeypatch.setitem(globals(), "scaled", torch.tanh)) == "value of scaled"


def test_default_argument_that_is_replaced_is_seen(monkeypatch):
    module = Block(lambda self, x: scaled(self.first(x)))
    told = told_after(module, lambda: monkeypatch.setattr(scaled, "__defaults__", (3.0,)))
    assert told == "value of the defaults of scaled"


def test_variable_of_a_closure_is_guarded():
    factor = 2.0

    def change():
        nonlocal factor
        factor = 3.0

    module = Block(lambda self, x: self.first(x) * factor)
    told = told_after(module, change)
    assert told is not None
    assert told.endswith("factor")


def test_environment_is_guarded(monkeypatch):
    monkeypatch.setenv("LORA_FX_TEST", "1")
    module = Block(lambda self, x: self.first(x) * float(os.environ.get("LORA_FX_TEST", "2")))
    assert told_after(module, lambda: monkeypatch.setenv("LORA_FX_TEST", "3")) == "value of $LORA_FX_TEST"


def test_question_to_torch_is_asked_again_at_each_call():
    module = Block(lambda self, x: self.first(x) if torch.are_deterministic_algorithms_enabled() else x)
    try:
        told = told_after(module, lambda: torch.use_deterministic_algorithms(True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert told == "value of are_deterministic_algorithms_enabled()"


def test_flag_of_a_backend_is_guarded(monkeypatch):
    module = Block(lambda self, x: self.first(x) if torch.backends.cuda.matmul.allow_tf32 else x)
    flag = torch.backends.cuda.matmul.allow_tf32
    try:
        told = told_after(module, put(torch.backends.cuda.matmul, "allow_tf32", not flag))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = flag
    assert told == "value of torch.backends.cuda.matmul.allow_tf32"


def counts_outside(self, x):
    COUNTS["calls"] += 1
    return self.first(x)


def test_write_to_a_global_is_refused_and_put_back():
    assert refusal(counts_outside) == "the forward changes COUNTS"
    assert COUNTS == {"calls": 0}


def test_clock_generators_and_inference_mode_are_refused():
    def inference(self, x):
        with torch.inference_mode():
            scale = x.max() + 1
        return self.first(x) / scale.clone()

    assert refusal(lambda self, x: self.first(x) * time.time()) == "the forward reads the clock (time)"
    assert refusal(lambda self, x: self.first(x) * GENERATOR.random()) == "the forward reads GENERATOR, of type Random"
    assert refusal(inference) == "the forward switches to inference mode"


def test_random_state_of_python_and_numpy_is_put_back_when_a_forward_is_refused():
    before, numpys = random.getstate(), np.random.get_state()[2]
    assert refusal(lambda self, x: self.first(x) * random.random()) == "the forward draws from Python's random"
    assert refusal(lambda self, x: self.first(x) * np.random.rand()) == "the forward draws from numpy's random"
    assert random.getstate() == before
    assert np.random.get_state()[2] == numpys


def test_numbers_of_a_library_need_no_mention_but_are_right():
    module = Block(lambda self, x: self.first(x) * math.pi)
    assert captured(module, x()).dependencies.retreats == {}
