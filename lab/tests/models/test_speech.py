"""Recognisers with an encoder and a decoder: pauses, transcripts, calibration and plans, on a small random model."""

import numpy as np
import pytest
import soundfile
import torch
from mapreuse_lab.models import SpeechModel, evaluate_plan, in_runtime, open_task
from mapreuse_lab.models._pauses import MAX_PIECE_SECONDS, speech_pieces
from transformers import BertConfig, BertModel

import mapreuse as mr

RATE = 16000


@pytest.fixture
def speech(small_moonshine, monkeypatch):
    """The small model with two recordings in each part of its corpus."""
    from mapreuse_lab.training import Corpus, open_corpus

    whole = open_corpus("prompts:en")
    few = (
        part.filter(lambda cut: 1 < cut.duration < 2).subset(first=4) for part in (whole.train, whole.dev, whole.test)
    )
    corpus = Corpus("few", "en", 8000, "", *few)
    monkeypatch.setattr("mapreuse_lab.models._speech.open_corpus", lambda name: corpus)
    return open_task(str(small_moonshine))


def voice(seconds, seed=0):
    """Noise as loud as speech, without a pause."""
    return np.random.default_rng(seed).standard_normal(round(seconds * RATE)).astype(np.float32) / 10


def silence(seconds, level=0.0):
    return level * np.random.default_rng(1).standard_normal(round(seconds * RATE)).astype(np.float32)


@pytest.mark.parametrize("level", [0.0, 1e-4])
@pytest.mark.parametrize("seconds", [10, 55])
def test_silence_before_speech_changes_no_transcript(seconds, level, speech):
    samples = np.concatenate([silence(0.4, level), voice(3), silence(0.4, level)])
    expected = speech.transcribe(samples)
    assert expected
    assert speech.transcribe(np.concatenate([silence(seconds, level), samples])) == expected


def test_recordings_are_cut_at_long_pauses_only():
    parts = [voice(3), silence(0.5), voice(2), silence(3), voice(4)]
    pieces = speech_pieces(np.concatenate(parts), RATE)
    assert [round(len(piece) / RATE, 1) for piece in pieces] == [5.7, 4.2]
    np.testing.assert_array_equal(pieces[0][: 5 * RATE], np.concatenate(parts)[: 5 * RATE])


def test_long_speech_without_a_pause_is_cut_where_it_is_quietest_and_nothing_is_lost():
    samples = voice(50)
    samples[24 * RATE : 24 * RATE + 800] *= 0.2
    pieces = speech_pieces(samples, RATE)
    assert max(map(len, pieces)) <= MAX_PIECE_SECONDS * RATE
    np.testing.assert_array_equal(np.concatenate(pieces), samples)
    assert abs(sum(map(len, pieces[: len(pieces) // 2])) / RATE - 24) < 0.05


def test_silence_has_no_transcript(speech):
    assert speech_pieces(silence(5), RATE) == speech_pieces(silence(0), RATE) == []
    assert speech.transcribe(silence(5)) == ""


def test_a_file_is_transcribed_at_any_sampling_rate_with_any_number_of_channels(speech, tmp_path):
    file = tmp_path / "voice.wav"
    soundfile.write(file, np.stack([voice(2), voice(2)], 1), RATE, subtype="FLOAT")
    assert speech.transcribe_file(file) == speech.transcribe(voice(2))
    soundfile.write(file, voice(2), 22050)
    assert speech.transcribe_file(file)
    file.write_text("no audio")
    with pytest.raises(ValueError, match=r"voice\.wav"):
        speech.transcribe_file(file)


@pytest.mark.parametrize("stack", ["model.encoder", "model.decoder"])
def test_calibration_batches_run_the_part_alone(stack, speech):
    batches = speech.calibration(stack)
    assert len(batches) == 4
    with torch.no_grad():
        assert speech.model.get_submodule(stack)(**batches[0]).last_hidden_state.isfinite().all()


def test_error_rates_under_a_plan_have_all_stages_and_leave_the_model_as_it_was(speech):
    before = {name: tensor.clone() for name, tensor in speech.model.state_dict().items()}
    found = evaluate_plan(speech, mr.ReusePlan.parse("2x2"))
    assert list(found) == ["original", "by index", "aligned", "refitted"]
    assert [one.name for one in found["original"]] == ["WER", "CER"]
    assert mr.plan_of(speech.model) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in speech.model.state_dict().items())


def test_a_plan_that_shares_nothing_changes_no_metric(speech):
    found = evaluate_plan(speech, mr.ReusePlan.full(4))
    for metrics in found.values():
        assert [one.value for one in metrics] == [one.value for one in found["original"]]


@pytest.mark.parametrize(
    ("runtime", "int8", "plan"),
    [
        ("openvino", False, None),
        pytest.param("openvino", True, "2x2", marks=pytest.mark.full),
        pytest.param("onnx", False, "2x2", marks=pytest.mark.full),
    ],
)
def test_error_rates_with_the_encoder_in_a_runtime(runtime, int8, plan, speech):
    found = evaluate_plan(speech, plan and mr.ReusePlan.parse(plan), runtime=runtime, int8=int8)
    stages = ["original", *(["by index", "aligned", "refitted"] if plan else [])]
    added = f", {runtime}{' int8' if int8 else ''}"
    assert list(found) == [name for stage in stages for name in (stage, stage + added)]
    if not int8:
        for stage in stages:
            assert [one.value for one in found[stage + added]] == [one.value for one in found[stage]]


def test_embeddings_in_a_runtime_in_int8_are_near_those_of_pytorch(tmp_path):
    config = BertConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    model = BertModel(config).eval()
    batches = [{"input_ids": torch.randint(0, 30, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.int64)}] * 3
    with torch.no_grad():
        expected = model(**batches[0]).last_hidden_state
        for int8 in (False, True):
            exported = in_runtime(model, "", batches, "openvino", int8, tmp_path / str(int8))
            found = exported(**batches[0], output_attentions=False).last_hidden_state
            error = (found - expected).norm() / expected.norm()
            assert (1e-4 < error < 0.15) if int8 else (error < 1e-4)


def test_a_model_tells_its_task(small_moonshine):
    assert isinstance(open_task(str(small_moonshine), corpus="prompts:en"), SpeechModel)
    with pytest.raises(ValueError, match="/nowhere: neither a model of `mapreuse-lab fetch` nor a directory"):
        open_task("/nowhere")
