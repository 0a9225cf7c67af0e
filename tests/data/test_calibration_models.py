"""Calibration of Whisper, of vision transformers, and of one of several stacks."""

import sys

import datasets
import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
from PIL import Image
from rich.console import Console
from tiny_models import SENTENCES, SIZE, tokenizer

import mapreuse as mr
from mapreuse import cli
from mapreuse.data import open_batches, open_model

HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
LAYERS = {"encoder_layers": 4, "decoder_layers": 4, "d_model": 32, "vocab_size": 40}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """One that hears a second, in 50 positions."""
    directory = tmp_path_factory.mktemp("whisper")
    config = tf.WhisperConfig(**HEADS, **LAYERS, **TOKENS, max_source_positions=50, num_mel_bins=16)
    torch.manual_seed(0)
    tf.WhisperForConditionalGeneration(config).save_pretrained(directory)
    tf.WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bart")
    tf.BartModel(tf.BartConfig(**HEADS, **LAYERS, **TOKENS, max_position_embeddings=64)).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    tf.ViTModel(tf.ViTConfig(**SIZE | {"num_hidden_layers": 4}, image_size=16, patch_size=4)).save_pretrained(
        directory
    )
    tf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(directory)
    return directory


@pytest.fixture
def recordings(tmp_path):
    noise = np.random.default_rng(0).standard_normal(16000) / 10
    (tmp_path / "recordings").mkdir()
    for number in range(9):
        soundfile.write(tmp_path / "recordings" / f"{number}.wav", noise[: 4000 + 1500 * number], 16000)
    return tmp_path / "recordings"


@pytest.fixture
def images(tmp_path):
    """Noise of different sizes, in colour, in grey and with transparency."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(9):
        shape = (20 + number, 30, *[(3,), (), (4,)][number % 3])
        name = f"{number}.png" if number % 3 else f"more/{number}.JPG"
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def command(monkeypatch, capsys, *arguments):
    """Exit status, standard output and standard error of the command."""
    monkeypatch.setattr(cli, "console", Console())
    monkeypatch.setattr(sys, "argv", ["mapreuse", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    written = capsys.readouterr()
    return stopped.value.code, written.out, written.err


def test_whisper_hears_recordings_as_its_feature_extractor_pads_them(whisper, recordings):
    opened = open_model(whisper, "model.encoder")
    batches = open_batches(opened, recordings)

    extractor = tf.WhisperFeatureExtractor.from_pretrained(whisper)
    assert len(batches) == 9
    for number, batch in enumerate(batches):
        audio, rate = soundfile.read(recordings / f"{number}.wav", dtype="float32")
        expected = extractor(audio, sampling_rate=rate, return_tensors="pt")["input_features"]
        assert expected.shape == (1, 16, 100)
        torch.testing.assert_close(batch["input_features"], expected)
        with torch.no_grad():
            assert torch.isfinite(opened.part(**batch).last_hidden_state).all()


def test_whispers_encoder_is_converted_and_analyzed(whisper, recordings, tmp_path, monkeypatch, capsys):
    given = [whisper, "--calibration", recordings, "--stack", "model.encoder"]
    out = tmp_path / "converted"
    status, printed, error = command(monkeypatch, capsys, "convert", *given, "--plan", "2x2", "--out", out)
    assert status == 0, error
    assert "error, refitted: " in printed
    converted = mr.load(out)
    assert mr.plan_of(converted.model.encoder).reuses(1)
    extractor = tf.AutoFeatureExtractor.from_pretrained(out)
    features = extractor(np.zeros(8000), sampling_rate=16000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        assert converted.model.encoder(features).last_hidden_state.shape == (1, 50, 32)

    status, _, error = command(monkeypatch, capsys, "analyze", *given, "--out", tmp_path / "maps")
    assert status == 0, error
    assert (tmp_path / "maps" / "analysis.json").is_file()


def test_images_are_read_as_the_image_processor_makes_them(vit, images):
    batches = open_batches(open_model(vit), images, batch_size=4)

    assert [len(batch["pixel_values"]) for batch in batches] == [4, 4, 1]
    files = sorted(file for file in images.rglob("*") if file.suffix in (".png", ".JPG"))
    processor = tf.AutoImageProcessor.from_pretrained(vit)
    expected = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")["pixel_values"]
    assert expected.shape == (9, 3, 16, 16)
    torch.testing.assert_close(torch.cat([batch["pixel_values"] for batch in batches]), expected)


def test_a_photograph_that_was_taken_on_its_side_is_seen_upright(vit, tmp_path):
    upright = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    turned, orientation = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    orientation[0x0112] = 6  # shown turned by a quarter, clockwise
    for number in range(2):
        upright.save(tmp_path / f"{number}.png")
        turned.save(tmp_path / f"turned{number}.png", exif=orientation)

    (batch,) = open_batches(open_model(vit), tmp_path)
    torch.testing.assert_close(batch["pixel_values"][2:], batch["pixel_values"][:2])


def test_a_datasets_directory_of_images_is_read_but_for_rows_without(vit, images, tmp_path):
    files = sorted(str(file) for file in images.rglob("*") if file.suffix in (".png", ".JPG"))
    rows = datasets.Dataset.from_dict({"picture": [files[0], None, *files[1:]], "label": list(range(len(files) + 1))})
    rows.cast_column("picture", datasets.Image()).save_to_disk(str(tmp_path / "data"))

    opened = open_model(vit)
    (ours,), (expected,) = (open_batches(opened, path, batch_size=9) for path in (tmp_path / "data", images))
    torch.testing.assert_close(ours["pixel_values"], expected["pixel_values"])


def test_a_vision_transformer_is_converted_and_analyzed(vit, images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "converted"
    given = [vit, "--calibration", images]
    status, printed, error = command(monkeypatch, capsys, "convert", *given, "--plan", "2x2", "--out", out)
    assert status == 0, error
    assert "error, refitted: " in printed
    assert mr.plan_of(mr.load(out)).reuses(1)
    assert open_batches(open_model(out), images)

    status, _, error = command(monkeypatch, capsys, "analyze", *given, "--out", tmp_path / "maps")
    assert status == 0, error
    assert (tmp_path / "maps" / "analysis.json").is_file()


def test_of_clip_either_stack_is_calibrated_within_its_own_positions(images, tmp_path):
    text = SIZE | {"vocab_size": 40, "max_position_embeddings": 5}
    config = tf.CLIPConfig(text_config=text, vision_config=SIZE | {"image_size": 16, "patch_size": 4})
    tf.CLIPModel(config).save_pretrained(tmp_path)
    side = {"height": 16, "width": 16}
    tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))

    for stack, path in (("text_model", tmp_path / "sentences.txt"), ("vision_model", images)):
        opened = open_model(tmp_path, stack)
        for batch in open_batches(opened, path):
            with torch.no_grad():
                assert torch.isfinite(opened.part(**batch).last_hidden_state).all()
    with pytest.raises(ValueError, match="CLIPEncoder takes no input_ids; choose the module around it"):
        open_batches(open_model(tmp_path, "text_model.encoder"), tmp_path / "sentences.txt")


def written(folder, name, contents=b""):
    (folder / name).write_bytes(contents)
    return folder


def with_recording(folder):
    soundfile.write(folder / "a.wav", np.zeros(8000), 16000)
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda images: images.parent / "nothing", "no such file or directory"),
        (lambda images: images / "1.png", r"1\.png: not a folder of png or jpg files"),
        (lambda images: written(images, "a.png", b"not an image"), r"a\.png: not a readable image"),
        (lambda images: written(images, "a.jpg"), r"a\.jpg: not a readable image"),
        (
            with_recording,
            r"both audio and images, such as 1\.png and a\.wav; give a folder of png or jpg files",
        ),
        (lambda images: images / "more", r"more: 3 images, at least 4 are wanted"),
    ],
)
def test_images_that_cannot_be_read_are_refused_on_one_line(vit, images, make, message):
    with pytest.raises(ValueError, match=message) as refused:
        open_batches(open_model(vit), make(images))

    assert "\n" not in str(refused.value)


def test_a_folder_without_an_image_and_a_model_without_an_image_processor_are_refused(vit, images, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no png or jpg files"):
        open_batches(open_model(vit), tmp_path / "empty")
    open_model(vit).model.save_pretrained(tmp_path / "blind")
    with pytest.raises(ValueError, match="holds no image processor"):
        open_batches(open_model(tmp_path / "blind"), images)


def test_recordings_among_images_are_refused_to_a_model_that_hears(whisper, recordings):
    Image.new("RGB", (8, 8)).save(recordings / "cover.png")
    with pytest.raises(ValueError, match=r"such as 0\.wav and cover\.png; give a folder of wav or flac files"):
        open_batches(open_model(whisper, "model.encoder"), recordings)


def test_images_that_make_no_batch_or_videos_are_refused_on_one_line(vit, images, tmp_path):
    model = open_model(vit).model
    model.save_pretrained(tmp_path / "unsized")
    tf.ViTImageProcessorPil(do_resize=False).save_pretrained(tmp_path / "unsized")
    with pytest.raises(ValueError, match="ViTImageProcessorPil makes no batch: ") as refused:
        open_batches(open_model(tmp_path / "unsized"), images)
    assert "\n" not in str(refused.value)

    model.save_pretrained(tmp_path / "videos")
    tf.VideoMAEImageProcessorPil().save_pretrained(tmp_path / "videos")
    with pytest.raises(ValueError, match="makes videos or tiles"):
        open_batches(open_model(tmp_path / "videos"), images)


@pytest.mark.parametrize("command_name", ["convert", "analyze"])
def test_a_decoder_that_attends_to_an_encoder_is_refused(bart, tmp_path, monkeypatch, capsys, command_name):
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES * 2))
    given = [bart, "--calibration", tmp_path / "sentences.txt", "--out", tmp_path / "out"]
    given += ["--plan", "2x2"] if command_name == "convert" else []
    status, _, error = command(monkeypatch, capsys, command_name, *given, "--stack", "decoder")

    assert status == 2
    assert error.startswith(
        "mapreuse: BartDecoder attends to an encoder's states, which calibration data do not hold"
    )
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_whispers_decoder_is_refused_and_berts_own_layers_are_not(whisper, recordings, tmp_path):
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))
    with pytest.raises(ValueError, match="WhisperDecoder attends to an encoder's states"):
        open_batches(open_model(whisper, "model.decoder"), tmp_path / "sentences.txt")

    tf.BertModel(tf.BertConfig(**SIZE, vocab_size=40)).save_pretrained(tmp_path / "bert")  # may take such states
    tokenizer().save_pretrained(tmp_path / "bert")
    assert open_batches(open_model(tmp_path / "bert"), tmp_path / "sentences.txt")


def test_a_stack_that_takes_no_input_is_refused(bart, tmp_path):
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))
    with pytest.raises(ValueError, match=r"ModuleList takes no input_ids; choose the module around it"):
        open_batches(open_model(bart, "encoder.layers"), tmp_path / "sentences.txt")
