"""As in tests/conftest.py: shapes are checked while tests run, and hypothesis draws the same examples every time."""

import os

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook(["mapreuse_lab.techniques"], "beartype.beartype")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def small_moonshine(tmp_path_factory):
    """A Moonshine of random weights, four narrow layers deep."""
    from mapreuse_lab.models import _moonshine
    from transformers import MoonshineConfig, MoonshineForConditionalGeneration, Wav2Vec2FeatureExtractor

    out = tmp_path_factory.mktemp("moonshine")
    letters = [b"\xe2\x96\x81", *(bytes([code]) for code in range(ord("a"), ord("z") + 1))]
    tokens = [b"<unk>", b"<s>", b"</s>", *(bytes([code]) for code in range(256)), *letters]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": len(tokens), "pad_token_id": 2}
    heads = {"encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4}
    layers = {"encoder_num_hidden_layers": 4, "decoder_num_hidden_layers": 4}
    torch.manual_seed(0)
    config = MoonshineConfig(**sizes, **heads, **layers, initializer_range=0.3, pad_head_dim_to_multiple_of=8)
    model = MoonshineForConditionalGeneration(config).eval()
    model.generation_config.update(max_length=60, pad_token_id=2, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(out)
    _moonshine._tokenizer(tokens).save_pretrained(out)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(out)
    return out
