"""Recordings are read as they are, or refused in one line."""

import io
import json
import struct

import numpy as np
import pytest
import soundfile
import torch
from tiny_models import save_wav2vec2

from mapreuse.data import as_waveform, open_batches, open_model, open_sound, resample

TONE = (0.3 * np.sin(np.arange(8000) / 5) * 32767).astype("<i2")


def wav(*, riff=None, data=None, rate=16000, samples=TONE):
    """The bytes of a wav file whose header has these sizes."""
    contents = samples.tobytes()
    form = struct.pack("<HHIIHH", 1, 1, rate % 2**32, 2 * rate % 2**32, 2, 16)
    riff, data = (36 + len(contents) if riff is None else riff), (len(contents) if data is None else data)
    head = b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt " + struct.pack("<I", 16) + form
    return head + b"data" + struct.pack("<I", data) + contents


@pytest.mark.parametrize("riff", [0, 8, 36, None, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [0, 0xFFFFFFFF, 0x7FFFF000, None])
def test_a_streamed_wav_file_is_read_to_its_end_from_disk_and_from_memory(tmp_path, riff, data):
    contents = wav(riff=riff, data=data)
    (tmp_path / "streamed.wav").write_bytes(contents)
    for file in (tmp_path / "streamed.wav", io.BytesIO(contents)):
        with open_sound(file) as sound:
            assert sound.frames == len(TONE)
            sound.seek(100)
            np.testing.assert_array_equal(sound.read(dtype="int16"), TONE[100:])
    assert (tmp_path / "streamed.wav").read_bytes() == contents


@pytest.mark.parametrize("samples", [TONE[:0], TONE])
def test_tags_after_the_samples_are_not_read_as_samples(tmp_path, samples):
    info = b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.16.100\0"
    contents = wav(samples=samples) + b"LIST" + struct.pack("<I", len(info)) + info
    (tmp_path / "tagged.wav").write_bytes(contents)
    for file in (tmp_path / "tagged.wav", io.BytesIO(contents)):
        with open_sound(file) as sound:
            np.testing.assert_array_equal(sound.read(dtype="int16"), samples)


@pytest.mark.parametrize("size", [None, 0, 2**64 - 1])
@pytest.mark.parametrize("kind", ["RF64", "RIFX"])
def test_wav_files_with_other_headers_are_read_or_refused_with_a_way_out(tmp_path, kind, size):
    order = "<" if kind == "RF64" else ">"
    given = 2 * len(TONE) if size is None else size
    form = struct.pack(f"{order}4sIHHIIHH", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16)
    if kind == "RF64":
        head = b"RF64" + b"\xff" * 4 + b"WAVEds64" + struct.pack("<IQQQI", 28, given, given, given // 2, 0)
        contents = head + form + b"data" + b"\xff" * 4 + TONE.tobytes()
    else:
        head = b"RIFX" + struct.pack(">I", min(36 + given, 2**32 - 1)) + b"WAVE"
        contents = head + form + b"data" + struct.pack(">I", min(given, 2**32 - 1)) + TONE.astype(">i2").tobytes()
    (tmp_path / "other.wav").write_bytes(contents)
    if size is None or (kind, size) == ("RIFX", 2**64 - 1):
        with open_sound(tmp_path / "other.wav") as sound:
            np.testing.assert_array_equal(sound.read(dtype="int16"), TONE)
    else:
        with (
            pytest.raises(ValueError, match=rf"other\.wav: the header of this {kind} .* ffmpeg"),
            open_sound(tmp_path / "other.wav"),
        ):
            pass


def test_a_wav_file_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "cut.wav").write_bytes(wav()[: 44 + 2 * 5000])
    with open_sound(tmp_path / "cut.wav") as sound:
        np.testing.assert_array_equal(sound.read(dtype="int16"), TONE[:5000])


@pytest.mark.parametrize("rate", [0, -1, 2_000_000])
def test_a_header_with_an_impossible_sampling_rate_is_refused(tmp_path, rate):
    (tmp_path / "a.wav").write_bytes(wav(rate=rate))
    with (
        pytest.raises(ValueError, match=r"a\.wav: (not a readable wav|the sampling rate must be)"),
        open_sound(tmp_path / "a.wav"),
    ):
        pass


def test_a_flac_file_that_was_cut_off_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).normal(0, 0.1, 30_000), 16000)
    (tmp_path / "a.flac").write_bytes((tmp_path / "a.flac").read_bytes()[:9000])
    with (
        pytest.raises(ValueError, match=r"a\.flac: not a readable wav or flac file"),
        open_sound(tmp_path / "a.flac") as sound,
    ):
        sound.read()


@pytest.mark.parametrize("rate", [0, -8000, 8000.5, float("nan"), float("inf"), True, "8000", None])
def test_a_sampling_rate_that_is_no_whole_number_of_hertz_is_refused(rate, tmp_path):
    message = "the sampling rate must be a whole number, from 1 to 1,000,000, got"
    for rates in ((rate, 8000), (8000, rate)):
        with pytest.raises(ValueError, match=message):
            resample(np.zeros(100, np.float32), *rates)
    model = save_wav2vec2(tmp_path / "model")
    settings = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps(settings | {"sampling_rate": rate}))
    (tmp_path / "audio").mkdir()
    for number in range(4):
        (tmp_path / "audio" / f"{number}.wav").write_bytes(wav())
    with pytest.raises(ValueError, match=rf"model: the feature extractor: {message}"):
        open_batches(open_model(model), tmp_path / "audio")


def test_reversed_half_and_integer_samples_are_taken_as_they_are():
    floats = TONE.astype(np.float32) / 32768
    for given, expected in (
        (TONE, floats),
        (floats[::-1], floats[::-1]),
        (floats[::2], floats[::2]),
        (floats.astype(np.float64), floats),
        (floats.astype(np.float16), floats.astype(np.float16)),
        ([0.5, -0.25], [0.5, -0.25]),
        (torch.from_numpy(TONE), floats),
        (torch.tensor([0.5, -0.25], requires_grad=True), [0.5, -0.25]),
        (torch.tensor([0.5, -0.25], dtype=torch.bfloat16, requires_grad=True), [0.5, -0.25]),
    ):
        found = as_waveform(given)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, np.asarray(expected, np.float32))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (TONE.astype(np.int32), "expected floats from -1 to 1 or 16-bit integers, got int32"),
        (TONE.astype(np.uint8), "got uint8"),
        (TONE > 0, "got bool"),
        (TONE * 1j, "got complex128"),
        ("song", r"expected one channel of shape \(samples,\), got shape \(\)"),
        (TONE.reshape(2, -1), r"got shape \(2, 4000\)"),
        (np.array([0.0, np.nan]), "not finite"),
        (np.array([1e300]), "not finite"),
        (torch.ones(3, device="meta"), "expected a dense tensor with data, got .* on meta"),
        (torch.ones(3).to_sparse(), "expected a dense tensor with data, got a torch.sparse_coo on cpu"),
    ],
)
def test_samples_of_another_type_or_shape_are_refused(samples, message):
    with pytest.raises(ValueError, match=f"^tape: .*{message}"):
        as_waveform(samples, "tape")
