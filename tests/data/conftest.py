"""Tiny models and calibration data on disk."""

import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
from PIL import Image
from tiny_models import SENTENCES, SIZE, save_bert, save_wav2vec2, tokenizer

HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
LAYERS = {"encoder_layers": 4, "decoder_layers": 4, "d_model": 32, "vocab_size": 40}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory):
    return save_wav2vec2(tmp_path_factory.mktemp("wav2vec2"))


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """Its inputs are one second long, which makes 50 positions."""
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
def sentences(tmp_path):
    file = tmp_path / "sentences.txt"
    file.write_text("\n\n".join(SENTENCES) + "\n")
    return file


@pytest.fixture
def recordings(tmp_path):
    """Tones of half a second to a second, with different rates and formats."""
    folder = tmp_path / "recordings"
    (folder / "more").mkdir(parents=True)
    for number, (name, rate) in enumerate(
        [("a.wav", 16000), ("b.flac", 8000), ("more/c.wav", 44100), ("more/d.WAV", 16000)]
    ):
        seconds = np.arange(int(rate * (0.5 + number / 8))) / rate
        soundfile.write(folder / name, 0.3 * np.sin(2 * np.pi * 440 * seconds), rate)
    (folder / "notes.txt").write_text("not a recording")
    return folder


@pytest.fixture
def images(tmp_path):
    """Noise in different sizes: RGB, grey, and with transparency."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(9):
        shape = (20 + number, 30, *[(3,), (), (4,)][number % 3])
        name = f"{number}.png" if number % 3 else f"more/{number}.JPG"
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder
