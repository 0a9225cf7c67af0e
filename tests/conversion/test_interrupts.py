"""An interrupted conversion continues: it repeats only the step in progress, and ends with the same model."""

import functools
import signal

import pytest
import torch
import transformers as tf
from text_batches import random_batches
from torch import nn

import mapreuse as mr
from mapreuse.conversion import _align, _distill, _evaluation, _refit, _search, convert_to_directory
from mapreuse.conversion._search_heuristic import RefitErrors

GROUPS = {"plan": mr.ReusePlan.grouped(3, 3)}
SEARCH = {"budget": {"error": 0.3}}


@pytest.fixture(autouse=True)
def interrupts_arrive():
    """A test run in the background of a shell would ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def bert():
    return peaked_bert(0)


def peaked_bert(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    model = tf.BertModel(tf.BertConfig(**sizes, vocab_size=50, max_position_embeddings=40))
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.dim() > 1):
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def converted(bert, out, **options):
    """The weights of the converted model, and the report."""
    kept = []
    report = convert_to_directory(
        bert, random_batches(8), out, lambda model, directory: kept.append(model.state_dict()), **options
    )
    return kept[0], report


def counting(monkeypatch, owner, name, stop_at=None, stop=None):
    """Count the calls of a function. The call number `stop_at` is interrupted."""
    calls, original = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == stop_at:
            (stop or interrupt)()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def interrupt():
    raise KeyboardInterrupt


PHASES = {
    "first map": (GROUPS, _align, "_summed_errors", 1, "comparing maps: 0 batches are kept, batch 0 is repeated"),
    "maps": (GROUPS, _align, "_summed_errors", 6, "comparing maps: 2 batches are kept, batch 2 is repeated"),
    "refit": (GROUPS, _refit, "_refit_layer", 2, "1 refitted layers are kept, layer 2 is repeated"),
    "outputs": (SEARCH, RefitErrors, "_gram", 6, "comparing outputs: 2 batches are kept, batch 2 is repeated"),
    "refit in a search": (
        SEARCH,
        _refit,
        "_refit_layer",
        4,
        "evaluated plans are kept, the first is evaluated again",
    ),
    "scores": (SEARCH, _evaluation, "refit_layers", 5, "4 evaluated plans are kept, the first is evaluated again"),
    "times": (SEARCH, _search, "_times", 2, None),
}


@pytest.fixture(scope="module")
def at_once(bert, tmp_path_factory):
    """Weights, report and numbers of calls of a conversion that is not interrupted, by its kind of budget."""

    @functools.cache
    def run(kind):
        with pytest.MonkeyPatch.context() as patch:
            phases = [phase[1:3] for phase in PHASES.values() if kind in phase[0]]
            calls = {name: counting(patch, owner, name) for owner, name in phases}
            options = GROUPS if kind in GROUPS else SEARCH
            weights, report = converted(bert, tmp_path_factory.mktemp(kind) / "out", **options)
            return weights, report, {name: len(some) for name, some in calls.items()}

    return run


FULL_ONLY = ("first map", "scores", "times")


@pytest.mark.parametrize(
    "phase", [pytest.param(one, marks=pytest.mark.full if one in FULL_ONLY else ()) for one in PHASES]
)
def test_what_was_learned_before_an_interrupt_is_not_computed_again(
    bert, at_once, tmp_path, regular_times, monkeypatch, phase
):
    options, owner, name, stop_at, note = PHASES[phase]
    expected, report, calls = at_once(*options)
    with monkeypatch.context() as patch:
        counting(patch, owner, name, stop_at)
        with pytest.raises(KeyboardInterrupt) as stopped:
            converted(bert, tmp_path / "out", **options)
    assert note is None or any(note in one for one in stopped.value.__notes__)
    with monkeypatch.context() as patch:
        repeated = counting(patch, owner, name)
        weights, resumed = converted(bert, tmp_path / "out", **options)

    again = 1 if phase == "scores" else 0  # the first plan identifies the metric
    assert len(repeated) == calls[name] - (stop_at - 1) + again
    assert resumed == report
    for key, weight in expected.items():
        torch.testing.assert_close(weights[key], weight, atol=1e-6, rtol=0)
    assert not (tmp_path / "out.work").exists()


def signalled():
    """What Python does when a signal arrives. A real one ends a process in which other tests have used OpenVINO."""
    signal.getsignal(signal.SIGINT)(signal.SIGINT, None)


@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_distillation_keeps_every_step_before_an_interrupt(bert, tmp_path, stop_at):
    batches = random_batches(9)
    config = mr.DistillConfig(steps=7, evaluate_every=3, bfloat16=False)

    def distilled(patch, folder, **options):
        model = mr.convert(bert, GROUPS["plan"])
        calls = counting(patch, _distill._Objective, "loss", **options)
        return model, calls, lambda: mr.distill(model, bert, batches, config, out_dir=folder)

    with pytest.MonkeyPatch.context() as patch:
        expected, _, run = distilled(patch, None)
        errors = run().errors
    with pytest.MonkeyPatch.context() as patch:
        _, calls, run = distilled(patch, tmp_path, stop_at=stop_at, stop=signalled)
        with pytest.raises(KeyboardInterrupt) as stopped:
            run()
        assert stopped.value.__notes__ == [f"distill: {stop_at} steps are kept"]
    with pytest.MonkeyPatch.context() as patch:
        model, calls, run = distilled(patch, tmp_path)
        assert run().errors == errors
    assert len(calls) == 7 - stop_at
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_a_second_interrupt_ends_a_distillation_at_once(bert, tmp_path, monkeypatch):
    model = mr.convert(bert, GROUPS["plan"])

    def twice():
        signalled()
        signalled()

    calls = counting(monkeypatch, _distill._Objective, "loss", stop_at=2, stop=twice)
    config = mr.DistillConfig(steps=7, evaluate_every=3, bfloat16=False)
    with pytest.raises(KeyboardInterrupt):
        mr.distill(model, bert, random_batches(9), config, out_dir=tmp_path)
    assert len(calls) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_work_of_another_model_or_other_batches_is_not_used(bert, tmp_path, regular_times, monkeypatch):
    with monkeypatch.context() as patch:
        counting(patch, _refit, "_refit_layer", 2)
        with pytest.raises(KeyboardInterrupt):
            converted(bert, tmp_path / "out", **GROUPS)
    other = peaked_bert(1)
    expected, report = converted(other, tmp_path / "at once", **GROUPS)
    weights, resumed = converted(other, tmp_path / "out", **GROUPS)
    assert resumed == report
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
