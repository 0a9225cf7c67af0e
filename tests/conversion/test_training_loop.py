"""The training loop, on a linear model: schedule, epochs, budgets and resuming."""

import json

import pytest
import torch
from torch import nn

from mapreuse.conversion import LoopConfig, TrainingLoop, checkpoints

CONFIG = LoopConfig(steps=8, learning_rate=0.1, evaluate_every=3)


class Interrupted(Exception):
    pass


def made_loop(config=CONFIG, *, num_batches=3, stop_at=None, seen=None, **options):
    """A loop over batches that are shuffled in each epoch; it raises at the step `stop_at`."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    target = torch.ones(1, 4)

    def batches(epoch, progress):
        if seen is not None:
            seen.append((epoch, progress))
        return [
            torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * epoch + n)) for n in range(num_batches)
        ]

    def loss(batch, step):
        if step == stop_at:
            raise Interrupted
        return (model(batch) - batch @ target.T).square().mean()

    def evaluate():
        return {"distance": (model.weight - target).norm().item()}

    options = {"evaluate": evaluate} | options
    return model, TrainingLoop(model, config, batches=batches, loss=loss, **options)


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine():
    config = LoopConfig(seconds=10.0, learning_rate=2.0, warmup=0.2)
    assert [config.learning_rate_at(0, seconds) for seconds in (0.0, 1.0, 2.0)] == pytest.approx([0, 1, 2])
    assert [config.learning_rate_at(0, seconds) for seconds in (4.0, 6.0, 8.0, 10.0)] == pytest.approx(
        [1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0]
    )
    steps = LoopConfig(steps=4, warmup=0.25)
    assert all(0 < steps.learning_rate_at(step, 0.0) < steps.learning_rate for step in range(4))


@pytest.mark.parametrize("stop_at", [1, 3, 5, 7])
def test_an_interrupted_loop_continues_with_the_same_bits(tmp_path, stop_at):
    expected, loop = made_loop()
    history = loop.run().history
    with pytest.raises(Interrupted):
        made_loop(stop_at=stop_at, out_dir=tmp_path)[1].run()
    model, resumed = made_loop(out_dir=tmp_path)
    assert resumed.state.step == stop_at - stop_at % 3
    found = resumed.run().history
    assert torch.equal(model.weight, expected.weight)
    assert [(one["step"], one["distance"], one["loss"]) for one in found] == [
        (one["step"], one["distance"], one["loss"]) for one in history
    ]
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-8"]


def test_each_epoch_is_told_how_much_of_the_budget_is_used():
    seen = []
    made_loop(seen=seen)[1].run()
    assert seen == [(0, 0.0), (1, 3 / 8), (2, 6 / 8)]


def test_the_best_weights_are_kept_and_patience_ends_the_run():
    distances = iter([3.0, 1.0, 2.0, 2.0, 0.0])
    config = LoopConfig(steps=100, evaluate_every=2, patience=2)
    _, loop = made_loop(config, evaluate=lambda: {"distance": next(distances)}, evaluate_first=True)
    state = loop.run()
    assert (state.step, state.best_step, state.finished) == (6, 2, True)


def test_without_metrics_the_latest_weights_are_kept():
    evaluations = []
    _, loop = made_loop(
        evaluate=None, on_evaluation=lambda state, improved: evaluations.append((state.step, improved))
    )
    assert loop.run().best_step == 8
    assert evaluations == [(3, True), (6, True), (8, True)]


def test_a_budget_in_seconds_ends_the_run():
    state = made_loop(LoopConfig(seconds=0.05))[1].run()
    assert state.elapsed >= 0.05
    assert state.finished


def test_a_loop_without_batches_is_refused():
    with pytest.raises(ValueError, match="training has no batches to learn from"):
        made_loop(num_batches=0)[1].run()


def test_checkpoints_of_another_version_are_refused_in_one_line(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "state.json").write_text(json.dumps({"run": {}, "of_model": [], "state": {}}))
    with pytest.raises(ValueError, match="checkpoint-3: not a checkpoint of this version of mapreuse; delete it"):
        made_loop(out_dir=tmp_path)
