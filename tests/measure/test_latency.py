"""Interleaved timing: order and arithmetic, never speed."""

import itertools
import time

import numpy as np
import pytest
import torch

from mapreuse.measure import Latency, _latency, machine, peak_memory, time_interleaved


def test_contestants_take_turns_without_gradients_and_the_warm_up_does_not_count():
    calls, modes = [], []
    contestants = {
        "a": lambda: calls.append("a"),
        "b": lambda: (calls.append("b"), modes.append(torch.is_inference_mode_enabled())),
    }
    measured = time_interleaved(contestants, repeats=3, warmup=2)

    assert calls == ["a", "b"] * 2 + ["a", "a", "b", "b"] * 3
    assert {name: len(latency.seconds) for name, latency in measured.items()} == {"a": 3, "b": 3}
    assert all(modes)


def test_the_second_call_of_a_turn_is_timed():
    def contestant():
        calls.append(None)
        time.sleep(0.1 if len(calls) % 2 == 0 else 0)  # after one warm-up call, the first of each turn is slow

    calls = []
    measured = time_interleaved({"a": contestant}, repeats=3)

    assert len(calls) == 1 + 2 * 3
    assert max(measured["a"].seconds) < 0.1


def test_median_and_spread_of_repeats():
    latency = Latency((1.0, 2.0, 3.0, 4.0, 100.0))

    assert latency.median == 3.0
    assert latency.spread == pytest.approx((4.0 - 2.0) / 2 / 3.0)
    assert Latency((5.0,)).spread == 0.0


def test_the_uncertainty_is_the_standard_deviation_of_medians():
    random = np.random.default_rng(0)
    repeats = 10 + random.standard_normal((4000, 25))
    medians = np.median(repeats, axis=1)
    found = [Latency(tuple(row)).uncertainty for row in repeats[:400]]

    assert np.mean(found) == pytest.approx(medians.std() / 10, rel=0.1)
    assert Latency((5.0,)).uncertainty == 0.0


def test_speed_ups_are_medians_of_quotients_of_the_same_turn():
    latency, slower = Latency((1.0, 4.0, 2.0)), Latency((4.0, 8.0, 6.0))

    assert latency.speed_up_over(slower) == {"median": 3.0, "spread": (3.5 - 2.5) / 2 / 3}  # of 4, 2 and 3
    assert latency.speed_up_over(latency) == {"median": 1.0, "spread": 0.0}


@pytest.mark.parametrize(
    ("seconds", "repeats"),
    [([1.0], 8), ([1.0, 1.2], 32), ([1.0, 1.2] * 4 + [1.1], 16)],
    ids=["steady", "wild", "calmer"],
)
def test_timing_goes_on_until_it_is_precise_or_four_times_as_long(monkeypatch, seconds, repeats):
    def taken(call):
        call()
        return next(clock)

    clock = itertools.chain(seconds, itertools.repeat(seconds[-1])) if len(seconds) > 2 else itertools.cycle(seconds)
    monkeypatch.setattr(_latency, "_cpu_seconds", taken)
    measured = time_interleaved({"a": lambda: None}, repeats=8, warmup=0, precision=0.02)

    assert len(measured["a"].seconds) == repeats
    assert repeats == 32 or measured["a"].uncertainty <= 0.02


def test_a_gpu_is_waited_for_before_and_after_a_call(monkeypatch):
    """With fake events: queued work runs when it is waited for."""
    queue, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queue.append(lambda: setattr(self, "at", now[0]))

        def elapsed_time(self, other):
            return other.at - self.at  # milliseconds; fails if one was not waited for

    def synchronize():
        while queue:
            queue.pop(0)()

    def work(milliseconds):
        queue.append(lambda: now.__setitem__(0, now[0] + milliseconds))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    work(1000)  # of earlier calls
    calls = {"short": lambda: work(2), "long": lambda: work(6)}
    measured = time_interleaved(calls, repeats=3, device="cuda")
    assert measured["short"].seconds == pytest.approx([0.002] * 3)
    assert measured["long"].seconds == pytest.approx([0.006] * 3)


def test_peak_memory_of_a_gpu_is_what_the_call_adds(monkeypatch):
    state = {"now": 100, "peak": 900}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: state["now"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: state.update(peak=state["now"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: state["peak"])
    assert peak_memory(lambda: state.update(peak=140), "cuda") == 40


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
