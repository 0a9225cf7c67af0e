import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from lhotse import CutSet, Recording
from mapreuse_lab.training import Recogniser, TrainConfig, evaluate, train
from mapreuse_lab.training._training import epoch_batches
from safetensors.torch import load_file

from mapreuse import ReusePlan, apply

SHORT = TrainConfig(steps=6, batch_seconds=5, evaluate_every=2, learning_rate=3e-3)


@pytest.fixture(autouse=True)
def _one_thread():
    """So small a model trains faster on one thread than on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(recogniser: Recogniser) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in recogniser.model.state_dict().items()}


class _Stop(Exception):
    pass


def test_a_resumed_run_gives_the_same_bits_as_an_uninterrupted_one(make_tiny, few, tmp_path):
    train(make_tiny(), few, SHORT, tmp_path / "whole")
    recogniser, passes = make_tiny(), []

    def stop_at_the_fourth_step(model, args):
        if model.training:
            passes.append(1)
            if len(passes) == 4:
                raise _Stop

    recogniser.model.register_forward_pre_hook(stop_at_the_fourth_step)
    with pytest.raises(_Stop):
        train(recogniser, few, SHORT, tmp_path / "broken")
    train(make_tiny(), few, SHORT, tmp_path / "broken")
    for file in ("checkpoint-6/model.safetensors", "checkpoint-6/optimizer.safetensors"):
        whole, broken = (load_file(tmp_path / run / file) for run in ("whole", "broken"))
        assert whole.keys() == broken.keys()
        assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_a_finished_run_is_not_repeated(make_tiny, few, tmp_path):
    first = make_tiny()
    scores = train(first, few, SHORT, tmp_path)
    log = (tmp_path / "log.jsonl").read_text()
    again = make_tiny()
    assert train(again, few, SHORT, tmp_path) == scores
    assert (tmp_path / "log.jsonl").read_text() == log
    assert all(torch.equal(weights(first)[name], tensor) for name, tensor in weights(again).items())


@pytest.mark.parametrize("change", ["weights", "plan", "features", "settings"])
def test_a_directory_with_another_run_is_refused(change, make_tiny, few, tmp_path):
    train(make_tiny(), few, SHORT, tmp_path / "run")
    other = make_tiny(seed=9 if change == "weights" else 0)
    if change == "plan":
        apply(other.model, ReusePlan.grouped(other.model.config.encoder_config.num_hidden_layers, 2))
    if change == "features":
        other.feature_config = replace(other.feature_config, hop=0.02)
    with pytest.raises(ValueError, match="holds a run with other settings, batches or weights"):
        train(other, few, replace(SHORT, steps=8) if change == "settings" else SHORT, tmp_path / "run")


def test_a_recording_that_is_not_finite_is_refused_by_name(make_tiny, few, tmp_path):
    cut = min(few.train, key=lambda cut: cut.duration)
    samples = cut.load_audio()[0]
    samples[100] = float("nan")
    soundfile.write(tmp_path / "nan.wav", samples, cut.sampling_rate, subtype="FLOAT")
    damaged = cut.recording.to_cut().with_id("spoilt")
    damaged.recording = Recording.from_file(tmp_path / "nan.wav")
    damaged.supervisions = cut.supervisions
    corpus = replace(few, train=CutSet.from_cuts([damaged]))
    with pytest.raises(ValueError, match="spoilt: contains samples that are not finite"):
        train(make_tiny(), corpus, SHORT, tmp_path / "run")
    with pytest.raises(ValueError, match="spoilt: contains samples that are not finite"):
        evaluate(make_tiny(), corpus.train)


def test_a_recogniser_learns_a_few_recordings(make_tiny, few, tmp_path):
    still = {"noise_probability": 0.0, "mask_bands": 0, "mask_spans_per_second": 0.0, "speeds": (1.0,)}
    recogniser = make_tiny(dropout=0.0)
    train(
        recogniser,
        replace(few, dev=CutSet.from_cuts([])),
        replace(SHORT, steps=250, evaluate_every=250, **still),
        tmp_path,
    )
    assert evaluate(recogniser, few.train).cer < 0.3


def test_the_best_weights_on_dev_are_kept_and_patience_ends_the_run(make_tiny, few, tmp_path):
    config = replace(SHORT, steps=40, evaluate_every=1, patience=2, learning_rate=1e-9)
    scores = train(make_tiny(), few, config, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(log) < 40
    best = min((line["dev_wer"], line["dev_cer"]) for line in log)
    assert (round(scores.wer, 4), round(scores.cer, 4)) == best


def test_recovery_trains_a_converted_recogniser_towards_the_original(few, baseline, tmp_path):
    converted = copy.deepcopy(baseline)
    apply(converted.model, ReusePlan.grouped(8, 2))
    before = divergence(baseline, converted, few)
    config = TrainConfig(steps=12, learning_rate=3e-4, batch_seconds=10, evaluate_every=100)
    train(converted, few, config, tmp_path, original=baseline)
    assert divergence(baseline, converted, few) < before
    assert Recogniser.load(tmp_path / "best").model.state_dict().keys() == converted.model.state_dict().keys()


def divergence(original: Recogniser, converted: Recogniser, corpus) -> float:
    audio = [cut.load_audio()[0] for cut in corpus.train]
    (target, lengths), (found, _) = original.logits(audio), converted.logits(audio)
    real = torch.arange(target.shape[1]) < lengths[:, None]
    found, target = found.log_softmax(-1)[real], target.log_softmax(-1)[real]
    return float(torch.nn.functional.kl_div(found, target, log_target=True, reduction="batchmean"))


def test_every_recorded_utterance_is_in_every_epoch_and_real_share_is_kept(prompts):
    config = TrainConfig(steps=1, real_share=(0.5, 1.0), batch_seconds=30)
    real, synthetic = list(prompts.train)[:100], list(prompts.train)[100:]
    for progress in (0.0, 1.0):
        batches = epoch_batches(real, synthetic, config, epoch=3, progress=progress)
        used = [cut for batch in batches for cut, _ in batch]
        assert {cut.id for cut in real} <= {cut.id for cut in used}
        seconds = sum(cut.duration for cut in used if cut.id in {c.id for c in real})
        share = seconds / sum(cut.duration for cut in used)
        assert share == pytest.approx(config.real_share[round(progress)], abs=0.08)
        for batch in batches:
            lengths = [cut.duration / speed for cut, speed in batch]
            assert len(batch) == 1 or len(batch) * max(lengths) <= 30


def test_generated_sentences_are_added_to_the_recordings(make_tiny, few, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = replace(SHORT, steps=2, synthetic_utterances=5, real_share=(0.5, 0.5))
    train(make_tiny(), few, config, tmp_path / "run")
    assert len(list((tmp_path / "cache").rglob("*.wav"))) == 5


TWO_PROCESSES = """
import os, sys
from pathlib import Path
from conftest import few_of, tiny_recogniser
from mapreuse_lab.training import TrainConfig, open_corpus, train
from safetensors.torch import save_file

out, recogniser = Path(sys.argv[1]), tiny_recogniser()
config = TrainConfig(steps=6, batch_seconds=3, evaluate_every=2)
train(recogniser, few_of(open_corpus("prompts:en")), config, out / "out")
save_file(recogniser.model.state_dict(), out / f"weights-{os.environ['RANK']}.safetensors")
"""


@pytest.mark.full  # the loop is the one of distillation, whose tests run it in two processes
def test_two_processes_train_one_model(tmp_path):
    """With the launcher that `accelerate launch --multi_gpu` uses."""
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *launch, script, tmp_path], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    states = [load_file(tmp_path / f"weights-{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 3


def test_an_impossible_share_of_recordings_is_refused():
    with pytest.raises(ValueError, match="real_share"):
        TrainConfig(steps=5, real_share=(0.0, 1.0))
