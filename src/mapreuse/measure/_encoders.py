"""The encoders that are timed: a front end, then layers; random weights, natural-looking inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel, ParakeetEncoder, ParakeetEncoderConfig, Wav2Vec2ConformerConfig
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoder

SUBSAMPLING = 4
"""Feature frames for one encoder frame of the Conformers."""

NUM_MEL_BINS = 80
_SCORE_PROJECTIONS = ("q_proj", "k_proj", "relative_k_proj", "linear_q", "linear_k", "query", "key")
_SPEECH_LIKE = (
    "log-mel-like features: noise smoothed over time and frequency under an envelope of 4 syllables a second, "
    "normalised bin by bin (seed 0)"
)


class Encoder(nn.Module):
    """An encoder in two parts that can be run, and timed, apart.

    Attributes:
        front: features or tokens to hidden states.
        layers: hidden states to `last_hidden_state`; what `mapreuse.apply` takes.
    """

    def __init__(self, front: nn.Module, layers: nn.Module) -> None:
        super().__init__()
        self.front = front
        self.layers = layers

    def forward(self, inputs: Tensor) -> Float[Tensor, "batch length width"]:
        return self.layers(self.front(inputs)).last_hidden_state


@dataclass(frozen=True)
class EncoderSpec:
    """How an encoder is built and fed.

    Attributes:
        num_layers: its depth.
        front: name of what runs before the layers.
        unit: what its lengths count.
        signal: what its inputs are, in words.
        has_relative_positions: its scores have a positional term of their own.
        lengths: at which it is timed unless told otherwise.
        build: an attention implementation of `transformers`, a depth and the greatest length to the encoder. The same
            arguments give the same weights.
        inputs: length and batch size to inputs.
    """

    num_layers: int
    front: str
    unit: str
    signal: str
    has_relative_positions: bool
    lengths: tuple[int, ...]
    build: Callable[[str, int, int], Encoder]
    inputs: Callable[[int, int], Tensor]


def conformer_m(
    num_mel_bins: int = NUM_MEL_BINS, *, num_layers: int = 16, implementation: str = "sdpa"
) -> ParakeetEncoder:
    """The papers' Conformer-M: 16 layers of width 256, 4 heads, convolution kernel 31; random weights."""
    config = ParakeetEncoderConfig(
        num_hidden_layers=num_layers,
        hidden_size=256,
        num_attention_heads=4,
        intermediate_size=1024,
        conv_kernel_size=31,
        subsampling_factor=SUBSAMPLING,
        num_mel_bins=num_mel_bins,
        layerdrop=0.0,
        attn_implementation=implementation,
    )
    return _seeded(lambda: ParakeetEncoder(config))


def speech_like_features(length: int, batch: int) -> Float[Tensor, "batch frames mels"]:
    """Normalised log-mel-like features for `length` encoder frames: smooth noise under a syllable-rate envelope."""
    generator = torch.Generator().manual_seed(0)
    frames = SUBSAMPLING * length
    noise = torch.randn(batch, frames, NUM_MEL_BINS, generator=generator)
    smooth = functional.avg_pool2d(noise, (7, 5), stride=1, padding=(3, 2))
    phase = 2 * math.pi * torch.rand(batch, 1, 1, generator=generator)
    envelope = torch.sin(2 * math.pi * 4 * torch.arange(frames)[:, None] / 100 + phase)
    features = smooth / smooth.std() + envelope
    return (features - features.mean(1, keepdim=True)) / features.std(1, keepdim=True)


def text_like_tokens(length: int, batch: int) -> Int[Tensor, "batch tokens"]:
    """Token ids whose frequencies follow Zipf's law, as those of text do."""
    uniform = torch.rand(batch, length, generator=torch.Generator().manual_seed(0))
    rank = torch.exp(uniform * math.log(BertConfig().vocab_size - 1000)).long()
    return 999 + rank


class _PassThrough(nn.Module):
    """In place of a front end that has run already."""

    def forward(self, hidden_states: Tensor, attention_mask: None = None) -> Tensor:
        return hidden_states


def _conformer(implementation: str, num_layers: int, longest: int) -> Encoder:
    layers: Any = conformer_m(num_layers=num_layers, implementation=implementation)
    front, layers.subsampling = layers.subsampling, _PassThrough()
    return Encoder(front, layers)


def _plain_conformer(implementation: str, num_layers: int, longest: int) -> Encoder:
    config = Wav2Vec2ConformerConfig(
        num_hidden_layers=num_layers,
        hidden_size=256,
        num_attention_heads=4,
        intermediate_size=1024,
        conv_depthwise_kernel_size=31,
        position_embeddings_type=None,
        layerdrop=0.0,
        attn_implementation=implementation,
    )
    layers: Any = _seeded(lambda: Wav2Vec2ConformerEncoder(config))
    layers.pos_conv_embed = nn.Identity()  # its forward never calls it
    return Encoder(conformer_m(num_layers=1).subsampling, layers)


def _bert(implementation: str, num_layers: int, longest: int) -> Encoder:
    config = BertConfig(
        num_hidden_layers=num_layers,
        max_position_embeddings=max(512, longest),
        attn_implementation=implementation,
    )
    model: Any = _seeded(lambda: BertModel(config, add_pooling_layer=False))
    return Encoder(model.embeddings, model.encoder)


def _seeded(build: Callable[[], nn.Module]) -> Any:
    """A model with the same random weights every time, in evaluation mode.

    Queries and keys are made so large that scores spread by about 2, as a trained model's do: under the usual initial
    weights all maps are nearly uniform, and a wrong one would go unnoticed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _SCORE_PROJECTIONS:
                    module.weight.normal_(std=1.4 * module.in_features**-0.5)
    return model.eval()


ENCODERS: dict[str, EncoderSpec] = {
    "conformer-m": EncoderSpec(
        num_layers=16,
        front="subsampling",
        unit="encoder frames of 40 ms",
        signal=_SPEECH_LIKE,
        has_relative_positions=True,
        lengths=(1000, 2000, 3000),
        build=_conformer,
        inputs=speech_like_features,
    ),
    "plain-conformer-m": EncoderSpec(
        num_layers=16,
        front="subsampling",
        unit="encoder frames of 40 ms",
        signal=_SPEECH_LIKE,
        has_relative_positions=False,
        lengths=(1000, 2000, 3000, 4000),
        build=_plain_conformer,
        inputs=speech_like_features,
    ),
    "bert-base": EncoderSpec(
        num_layers=12,
        front="embeddings",
        unit="tokens",
        signal="token ids distributed by Zipf's law (seed 0)",
        has_relative_positions=False,
        lengths=(128, 256, 512),
        build=_bert,
        inputs=text_like_tokens,
    ),
}
"""The encoders that `mapreuse bench` knows, by name."""
