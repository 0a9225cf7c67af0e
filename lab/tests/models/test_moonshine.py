"""Moonshine's weights, read from the graphs of ONNX Runtime, against that runtime."""

import zipfile

import numpy as np
import pytest
import torch
from mapreuse_lab.models import MODEL_PACKAGES, SpeechModel, _moonshine, _packages
from mapreuse_lab.training import open_corpus, waveform_of

TOLERANCE = 0.05
"""Relative error: the runtime also rounds activations to 8 bits."""


@pytest.mark.full
def test_states_and_tokens_equal_those_of_the_runtime(tmp_path):
    import onnxruntime

    package = MODEL_PACKAGES["moonshine-tiny"]
    with zipfile.ZipFile(_packages._download(package, tmp_path)) as archive:
        encoder, decoder = (
            onnxruntime.InferenceSession(archive.read(package.folder + name))
            for name in ("encoder_model.ort", "decoder_model_merged.ort")
        )
    speech = SpeechModel("moonshine-tiny")
    for cut in list(open_corpus("prompts:en").dev)[:6]:
        samples = waveform_of(cut, 16000)
        inputs = speech.inputs(samples)
        tokens = speech._generated(speech.model, samples)
        feeds = {"input_values": inputs["input_values"].numpy(), "attention_mask": inputs["attention_mask"].numpy()}
        feeds["attention_mask"] = feeds["attention_mask"].astype(np.int64)
        (states,) = encoder.run(None, feeds)
        given = {"input_ids": tokens.numpy(), "encoder_hidden_states": states, "use_cache_branch": np.array([False])}
        given["encoder_attention_mask"] = np.ones(states.shape[:2], np.int64)
        past = [one.name for one in decoder.get_inputs() if one.name.startswith("past")]
        given |= {name: np.zeros((1, 8, 0, 36), np.float32) for name in past}
        logits = torch.tensor(decoder.run(["logits"], given)[0])
        with torch.no_grad():
            converted = speech.model(**inputs, decoder_input_ids=tokens)
        assert error(converted.encoder_last_hidden_state, torch.tensor(states)) < TOLERANCE
        assert error(converted.logits, logits) < TOLERANCE
        assert torch.equal(converted.logits.argmax(-1), logits.argmax(-1))


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_tokens_are_read_with_lengths_of_one_and_two_bytes():
    long = b"x" * 300  # 300 = 44 + 2 · 128
    data = bytes([2]) + b"ab" + bytes([0]) + bytes([172, 2]) + long + bytes([1]) + b"c"
    assert list(_moonshine._tokens(data)) == [b"ab", b"", long, b"c"]


def test_text_survives_the_tokenizer():
    letters = [b"\xe2\x96\x81", *(bytes([code]) for code in range(ord("a"), ord("z") + 1))]
    words = [b"th", b"the", "▁the".encode(), "▁press".encode()]
    tokens = [b"<unk>", b"<s>", b"</s>", *(bytes([code]) for code in range(256)), *letters, *words]
    tokenizer = _moonshine._tokenizer(tokens)
    found = tokenizer("the key é")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(found)[:3] == ["<s>", "▁the", "▁"]
    assert tokenizer.decode(found, skip_special_tokens=True) == "the key é"
