"""Interleaved timing: order and arithmetic, never speed."""

import time

import pytest
import torch

from mapreuse.measure import Latency, machine, time_interleaved


def test_contestants_take_turns_and_warm_up_rounds_do_not_count():
    calls = []
    contestants = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    measured = time_interleaved(contestants, repeats=3, warmup=2)

    assert calls == ["a", "b"] * 2 + ["a", "a", "b", "b"] * 3
    assert {name: len(latency.seconds) for name, latency in measured.items()} == {"a": 3, "b": 3}


def test_the_second_call_of_a_turn_is_timed():
    def contestant():
        calls.append(None)
        time.sleep(0.1 if len(calls) % 2 == 0 else 0)  # after one call to warm up, the first of every turn is slow

    calls = []
    measured = time_interleaved({"a": contestant}, repeats=3)

    assert len(calls) == 1 + 2 * 3
    assert max(measured["a"].seconds) < 0.1


def test_median_and_spread_of_repeats():
    latency = Latency((1.0, 2.0, 3.0, 4.0, 100.0))

    assert latency.median == 3.0
    assert latency.spread == pytest.approx((4.0 - 2.0) / 2 / 3.0)
    assert Latency((5.0,)).spread == 0.0


def test_contestants_run_without_gradients():
    modes = []
    time_interleaved({"a": lambda: modes.append(torch.is_inference_mode_enabled())}, repeats=1, warmup=0)

    assert modes == [True, True]


def test_progress_advances_once_for_every_call():
    advanced = []
    time_interleaved({"a": lambda: None, "b": lambda: None}, repeats=2, warmup=1, advance=lambda: advanced.append(1))

    assert len(advanced) == 6


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_cuda_is_timed_by_events():
    x = torch.randn(2048, 2048, device="cuda")
    measured = time_interleaved({"product": lambda: x @ x}, repeats=3, device="cuda")

    assert measured["product"].median > 0


def test_the_machine_is_described_with_its_versions():
    described = machine()

    assert described["torch"] == torch.__version__
    assert described["cores"] >= 1
    assert all(value not in ("", None) for value in described.values())
