"""Encoders with random weights, and natural-looking inputs for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel, ParakeetEncoder, ParakeetEncoderConfig, Wav2Vec2ConformerConfig
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoder

SUBSAMPLING = 4
"""Feature frames per encoder frame of the Conformers."""

_NUM_MEL_BINS = 80
_CONFORMER_M: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "layerdrop": 0.0,
    "attn_implementation": "sdpa",
}
_SCORE_PROJECTIONS = ("q_proj", "k_proj", "relative_k_proj", "linear_q", "linear_k", "query", "key")


def conformer_m(num_mel_bins: int = _NUM_MEL_BINS, *, num_layers: int = 16) -> ParakeetEncoder:
    """The papers' Conformer-M: 16 layers of width 256, 4 heads, convolution kernel 31; random weights."""
    config = ParakeetEncoderConfig(
        num_hidden_layers=num_layers,
        conv_kernel_size=31,
        subsampling_factor=SUBSAMPLING,
        num_mel_bins=num_mel_bins,
        **_CONFORMER_M,
    )
    return _seeded(lambda: ParakeetEncoder(config))


def plain_conformer_m(*, num_layers: int = 16) -> Wav2Vec2ConformerEncoder:
    """Conformer-M's layers without relative positions, on hidden states; random weights."""
    config = Wav2Vec2ConformerConfig(
        num_hidden_layers=num_layers,
        conv_depthwise_kernel_size=31,
        position_embeddings_type=None,
        **_CONFORMER_M,
    )
    encoder = _seeded(lambda: Wav2Vec2ConformerEncoder(config))
    encoder.pos_conv_embed = nn.Identity()  # forward never calls it
    return encoder


def bert_base(max_length: int, *, num_layers: int = 12) -> BertModel:
    """BERT-base with random weights."""
    config = BertConfig(
        num_hidden_layers=num_layers, max_position_embeddings=max(512, max_length), attn_implementation="sdpa"
    )
    return _seeded(lambda: BertModel(config, add_pooling_layer=False))


def minilm(max_length: int, *, num_layers: int = 6) -> BertModel:
    """The size of all-MiniLM-L6-v2, 6 layers of width 384 with 12 heads, with random weights."""
    config = BertConfig(
        hidden_size=384,
        num_attention_heads=12,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        max_position_embeddings=max(512, max_length),
        attn_implementation="sdpa",
    )
    return _seeded(lambda: BertModel(config, add_pooling_layer=False))


def speech_like_features(
    length: int, batch_size: int, num_mel_bins: int = _NUM_MEL_BINS
) -> Float[Tensor, "batch frames mels"]:
    """Log-mel-like features for `length` encoder frames, normalised bin by bin.

    They are noise, smoothed over time and frequency, with an envelope of 4 syllables per second.
    """
    generator = torch.Generator().manual_seed(0)
    frames = SUBSAMPLING * length
    noise = torch.randn(batch_size, frames, num_mel_bins, generator=generator)
    smooth = functional.avg_pool2d(noise, (7, 5), stride=1, padding=(3, 2))
    phase = 2 * math.pi * torch.rand(batch_size, 1, 1, generator=generator)
    envelope = torch.sin(2 * math.pi * 4 * torch.arange(frames)[:, None] / 100 + phase)
    features = smooth / smooth.std() + envelope
    return (features - features.mean(1, keepdim=True)) / features.std(1, keepdim=True)


def speech_like_states(length: int, batch_size: int) -> Float[Tensor, "batch length width"]:
    """Hidden states of a Conformer: speech-like features after Conformer-M's subsampling."""
    with torch.no_grad():
        return conformer_m(num_layers=1).subsampling(speech_like_features(length, batch_size))


def text_like_tokens(length: int, batch_size: int) -> Int[Tensor, "batch tokens"]:
    """Token ids with Zipf-distributed frequencies, like text."""
    uniform = torch.rand(batch_size, length, generator=torch.Generator().manual_seed(0))
    rank = torch.exp(uniform * math.log(BertConfig().vocab_size - 1000)).long()
    return 999 + rank


def _seeded(build: Callable[[], nn.Module]) -> Any:
    """A model in evaluation mode with reproducible random weights.

    Query and key weights are scaled so that scores have a standard deviation of about 2, as in trained models. With
    the usual initialisation all maps would be nearly uniform, and a wrong map would not change the output.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _SCORE_PROJECTIONS:
                    module.weight.normal_(std=1.4 * module.in_features**-0.5)
    return model.eval()
