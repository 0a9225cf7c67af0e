"""Texts, recordings and images become batches, or are refused in one line."""

import datasets
import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
from PIL import Image
from tiny_models import SENTENCES, SIZE, save_bert, save_wav2vec2, tokenizer, without, write

from mapreuse.data import batches_by_length, open_batches, open_model, sound_files


def test_sentences_are_batched_by_length_and_cut_at_the_models_positions(bert, sentences):
    batches = open_batches(open_model(bert), str(sentences), batch_size=2)
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in batches]

    assert lengths == [[1, 3], [6, 8], [8, 8]]
    for batch in batches:
        assert batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max()
        assert batch["input_ids"].device.type == "cpu"
    words = tokenizer()
    assert words.decode(batches[0]["input_ids"][1]) == "maps are alike"
    assert words.decode(batches[0]["input_ids"][0]) == "heads [PAD] [PAD]"


def test_windows_cover_the_text_without_overlap(bert, sentences):
    words = tokenizer()
    batches = open_batches(open_model(bert), sentences, batch_size=2, window=7)
    rows = torch.cat([batch["input_ids"] for batch in batches])
    tokens = words(sentences.read_text().rstrip("\n"))["input_ids"]
    assert rows.flatten().tolist() == tokens[: len(tokens) // 7 * 7]
    assert all(bool(batch["attention_mask"].all()) for batch in batches)
    assert len(open_batches(open_model(bert), sentences, batch_size=2, max_batches=2, window=7)) == 2


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (1, "window must be a whole number, at least 2, got 1"),
        (9, "window=9 is more than the 8 tokens"),
        (7, "found 2 windows of 7 tokens, but at least 4"),
    ],
)
def test_windows_that_the_model_cannot_take_or_the_text_does_not_fill_are_refused(bert, tmp_path, window, message):
    text = tmp_path / "short.txt"
    text.write_text("one two three\n" * 5)
    with pytest.raises(ValueError, match=message):
        open_batches(open_model(bert), text, window=window)


def test_max_batches_limits_the_number_of_sentences(bert, sentences):
    batches = open_batches(open_model(bert), sentences, batch_size=2, max_batches=2)

    assert sum(len(batch["input_ids"]) for batch in batches) == 4
    assert batches[0]["attention_mask"].sum(1).tolist() == [1, 3]


def test_a_long_sentence_is_cut_to_the_positions_of_roberta(tmp_path):
    config = dict(vocab_size=60, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    model = tf.RobertaModel(tf.RobertaConfig(**config, max_position_embeddings=20, pad_token_id=1))
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "long.txt").write_text("\n".join([" ".join(SENTENCES * 5)] * 4))

    (batch,) = open_batches(open_model(tmp_path), tmp_path / "long.txt")
    assert batch["input_ids"].shape[1] == 18
    with torch.no_grad():
        model(**batch)


def test_recordings_are_resampled_to_the_rate_of_the_model(wav2vec2, recordings):
    opened = open_model(wav2vec2)
    batches = open_batches(opened, recordings, batch_size=2)

    assert [batch["attention_mask"].sum(1).tolist() for batch in batches] == [[8000, 10000], [12000, 14000]]
    for batch in batches:
        for samples, mask in zip(batch["input_values"], batch["attention_mask"].bool(), strict=True):
            spectrum = torch.fft.rfft(samples[mask]).abs()
            assert spectrum.argmax() * 16000 / mask.sum() == pytest.approx(440, abs=2)
    with torch.no_grad():
        assert torch.isfinite(opened.model(**batches[0]).logits).all()


def test_long_recordings_are_cut_and_are_batches_of_their_own(wav2vec2, tmp_path):
    noise = np.random.default_rng(0).standard_normal(25 * 16000) / 10
    for number, seconds in enumerate((9, 12, 25, 9)):
        soundfile.write(tmp_path / f"{number}.wav", noise[: seconds * 16000], 16000)
    batches = open_batches(open_model(wav2vec2), tmp_path)

    assert [(batch["attention_mask"].sum(1) / 16000).tolist() for batch in batches] == [[9, 9], [12], [20]]


def test_whisper_gets_one_recording_per_batch_padded_by_its_feature_extractor(whisper, recordings):
    opened = open_model(whisper, "model.encoder")
    batches = open_batches(opened, recordings)

    extractor = tf.WhisperFeatureExtractor.from_pretrained(whisper)
    assert len(batches) == 4
    for name, batch in (("a.wav", batches[0]), ("more/d.WAV", batches[3])):
        audio, rate = soundfile.read(recordings / name, dtype="float32")
        expected = extractor(audio, sampling_rate=rate, return_tensors="pt")["input_features"]
        assert expected.shape == (1, 16, 100)
        torch.testing.assert_close(batch["input_features"], expected)
        with torch.no_grad():
            assert torch.isfinite(opened.part(**batch).last_hidden_state).all()


def test_images_are_prepared_by_the_image_processor(vit, images):
    batches = open_batches(open_model(vit), images, batch_size=4)

    assert [len(batch["pixel_values"]) for batch in batches] == [4, 4, 1]
    files = sorted(file for file in images.rglob("*") if file.suffix in (".png", ".JPG"))
    processor = tf.AutoImageProcessor.from_pretrained(vit)
    expected = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")["pixel_values"]
    assert expected.shape == (9, 3, 16, 16)
    torch.testing.assert_close(torch.cat([batch["pixel_values"] for batch in batches]), expected)


def test_a_rotated_photograph_is_turned_upright(vit, tmp_path):
    upright = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    turned, orientation = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    orientation[0x0112] = 6  # shown turned by a quarter, clockwise
    for number in range(2):
        upright.save(tmp_path / f"{number}.png")
        turned.save(tmp_path / f"turned{number}.png", exif=orientation)

    (batch,) = open_batches(open_model(vit), tmp_path)
    torch.testing.assert_close(batch["pixel_values"][2:], batch["pixel_values"][:2])


def test_both_stacks_of_clip_get_batches_of_their_kind(images, tmp_path):
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


def test_batches_hold_no_more_than_their_size_and_budget():
    assert batches_by_length([3, 1, 2, 9, 2], batch_size=2, budget=100) == [[1, 2], [4, 0], [3]]
    assert batches_by_length([3, 1, 2, 9, 2], batch_size=5, budget=6) == [[1, 2, 4], [0], [3]]
    assert batches_by_length([], batch_size=5, budget=6) == []


def test_batches_are_smaller_if_there_would_be_too_few(bert, sentences):
    batches = open_batches(open_model(bert), sentences, min_batches=3)
    assert [len(batch["input_ids"]) for batch in batches] == [len(SENTENCES) // 3] * 3


@pytest.mark.parametrize("number", [8, 15, 17])
def test_there_are_as_many_batches_as_samples_are_needed(bert, tmp_path, number):
    file = few(tmp_path, "maps\n" * number)
    assert len(open_batches(open_model(bert), file, min_batches=16, min_samples=8)) >= 8


def test_the_texts_of_a_datasets_directory_are_read(bert, tmp_path):
    columns = {"text": SENTENCES, "label": list(range(len(SENTENCES)))}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)}).save_to_disk(str(tmp_path))

    assert [len(batch["input_ids"]) for batch in open_batches(open_model(bert), tmp_path)] == [len(SENTENCES)]


def test_the_audio_of_a_datasets_directory_is_read_without_empty_rows(wav2vec2, recordings, tmp_path):
    files = [str(file) for file in sound_files(recordings)]
    rows = datasets.Dataset.from_dict({"audio": [files[0], None, *files[1:]]})
    rows.cast_column("audio", datasets.Audio()).save_to_disk(str(tmp_path / "data"))

    opened = open_model(wav2vec2)
    found, expected = (open_batches(opened, path, batch_size=1) for path in (tmp_path / "data", recordings))
    assert len(found) == len(files)
    assert sorted(batch["input_values"].shape[-1] for batch in found) == sorted(
        batch["input_values"].shape[-1] for batch in expected
    )


def test_the_images_of_a_datasets_directory_are_read_without_empty_rows(vit, images, tmp_path):
    files = sorted(str(file) for file in images.rglob("*") if file.suffix in (".png", ".JPG"))
    rows = datasets.Dataset.from_dict({"picture": [files[0], None, *files[1:]], "label": list(range(len(files) + 1))})
    rows.cast_column("picture", datasets.Image()).save_to_disk(str(tmp_path / "data"))

    opened = open_model(vit)
    (found,), (expected,) = (open_batches(opened, path, batch_size=9) for path in (tmp_path / "data", images))
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"])


def few(folder, text="one\ntwo\nthree\n"):
    return write(folder, "few.txt", text) / "few.txt"


def four(folder, suffix, contents):
    for number in range(4):
        write(folder, f"{number}.{suffix}", contents)
    return folder


def tones(folder, seconds):
    folder.mkdir(exist_ok=True)
    for number in range(4):
        soundfile.write(folder / f"{number}.wav", 0.1 * np.sin(np.arange(int(seconds * 16000)) / 5), 16000)
    return folder


def dataset(folder, columns, split=None):
    rows = datasets.Dataset.from_dict(columns)
    (datasets.DatasetDict({split: rows}) if split else rows).save_to_disk(str(folder / "data"))
    return folder / "data"


@pytest.mark.parametrize(
    ("model", "make", "message"),
    [
        ("bert", lambda there: there / "nothing", "no such file or directory"),
        ("bert", lambda there: there, "expected a text file with one sentence per line"),
        ("bert", few, "found 3 sentences, but at least 4 are needed"),
        ("bert", lambda there: few(there, ""), "0 sentences"),
        ("bert", lambda there: few(there, b"RIFF\xff\xfe\x80\x81"), "not a text file in UTF-8"),
        ("bert", lambda there: few(there, "one\x00\ntwo\n\n"), "not a text file"),
        ("bert", lambda there: write(there, "dataset_info.json", "{}"), "neither a `Dataset` directory"),
        ("bert", lambda there: dataset(there, {"text": []}), "contains no rows"),
        ("bert", lambda there: dataset(there, {"text": []}, "train"), "contains no rows"),
        ("bert", lambda there: dataset(there, {"text": [1, 2]}), "expected a column 'text', .*; found text .int64."),
        (
            "bert",
            lambda there: dataset(there, {"first": SENTENCES, "second": SENTENCES}),
            "found first .string., second .string.",
        ),
        ("wav2vec2", lambda there: there, "contains no wav or flac files"),
        ("wav2vec2", few, "not a folder of wav or flac files"),
        (
            "wav2vec2",
            lambda there: write(tones(there, 1), "0.wav", "no sound"),
            r"0\.wav: not a readable wav or flac",
        ),
        ("wav2vec2", lambda there: tones(there, 0.02), r"too short, 0\.020 s; the minimum is 0\.05 s"),
        ("wav2vec2", lambda there: without(tones(there, 1), "[1-3].wav"), "found 1 recordings, but at least 4 are"),
        ("vit", lambda there: there, "contains no png or jpg files"),
        ("vit", few, r"few\.txt: not a folder of png or jpg files"),
        ("vit", lambda there: four(there, "png", "not an image"), r"0\.png: not a readable image"),
        ("vit", lambda there: four(there, "jpg", ""), r"0\.jpg: not a readable image"),
        (
            "vit",
            lambda there: write(tones(there, 1), "a.png"),
            r"such as a\.png and 0\.wav; expected only png or jpg",
        ),
    ],
)
def test_data_that_cannot_be_read_is_refused_in_one_line(model, make, message, tmp_path, request):
    with pytest.raises(ValueError, match=message) as refused:
        open_batches(open_model(request.getfixturevalue(model)), make(tmp_path))
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_the_number_of_samples_needed_is_checked(bert, wav2vec2, recordings, tmp_path):
    with pytest.raises(ValueError, match="found 4 recordings, but at least 8 are needed"):
        open_batches(open_model(wav2vec2), recordings, min_samples=8)
    with pytest.raises(ValueError, match="max_batches=1 reads 8 samples, but at least 11 are needed"):
        open_batches(open_model(bert), few(tmp_path, "maps\n" * 20), max_batches=1, min_samples=11)


def test_a_model_without_its_own_tokenizer_or_processor_is_refused(vit, tmp_path, sentences, recordings, images):
    bare = without(without(save_bert(tmp_path / "bare"), "tokenizer*"), "special_tokens*")
    with pytest.raises(ValueError, match="contains no tokenizer"):
        open_batches(open_model(bare), sentences)
    foreign = save_bert(tmp_path / "foreign", vocab_size=5)
    with pytest.raises(ValueError, match=r"returns token \d+, but BertForMaskedLM has only 5"):
        open_batches(open_model(foreign), sentences)
    deaf = without(save_wav2vec2(tmp_path / "deaf"), "preprocessor_config.json")
    with pytest.raises(ValueError, match="contains no feature extractor"):
        open_batches(open_model(deaf), recordings)
    open_model(vit).model.save_pretrained(tmp_path / "blind")
    with pytest.raises(ValueError, match="contains no image processor"):
        open_batches(open_model(tmp_path / "blind"), images)


def test_images_that_make_no_batch_and_videos_are_refused_in_one_line(vit, images, tmp_path):
    model = open_model(vit).model
    model.save_pretrained(tmp_path / "unsized")
    tf.ViTImageProcessorPil(do_resize=False).save_pretrained(tmp_path / "unsized")
    with pytest.raises(ValueError, match="ViTImageProcessorPil cannot make a batch: ") as refused:
        open_batches(open_model(tmp_path / "unsized"), images)
    assert "\n" not in str(refused.value)

    model.save_pretrained(tmp_path / "videos")
    tf.VideoMAEImageProcessorPil().save_pretrained(tmp_path / "videos")
    with pytest.raises(ValueError, match="makes videos or tiles"):
        open_batches(open_model(tmp_path / "videos"), images)


def test_a_model_with_another_kind_of_input_is_refused(tmp_path):
    config = tf.PatchTSTConfig(d_model=16, num_hidden_layers=2, num_attention_heads=2)
    tf.PatchTSTModel(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="PatchTSTModel takes past_values; calibration data can be text, audio or images"
    ):
        open_batches(open_model(tmp_path), tmp_path)


def test_a_decoder_that_attends_to_an_encoder_is_refused_but_not_bert(whisper, tmp_path):
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))
    with pytest.raises(ValueError, match="WhisperDecoder attends to the hidden states of an encoder"):
        open_batches(open_model(whisper, "model.decoder"), tmp_path / "sentences.txt")

    tf.BertModel(tf.BertConfig(**SIZE, vocab_size=40)).save_pretrained(tmp_path / "bert")  # may take such states
    tokenizer().save_pretrained(tmp_path / "bert")
    assert open_batches(open_model(tmp_path / "bert"), tmp_path / "sentences.txt")


def test_a_stack_that_takes_no_input_is_refused(bart, tmp_path):
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))
    with pytest.raises(ValueError, match=r"ModuleList takes no input_ids; choose the module around it"):
        open_batches(open_model(bart, "encoder.layers"), tmp_path / "sentences.txt")
