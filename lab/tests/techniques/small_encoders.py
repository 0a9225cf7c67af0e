"""Small Parakeet encoders with peaked maps, their inputs, and one layer's attention beside its definition."""

from __future__ import annotations

import copy
import functools

import torch
import transformers as tf
from mapreuse_lab.techniques import parse
from torch import Tensor, nn

from mapreuse.maps import reference

NUM_LAYERS, NUM_HEADS, WIDTH, HEAD_DIM = 4, 4, 32, 8
VARIANTS = [
    "full",
    "reuse-2x2",
    "reuse-[0,1,0,1]",
    "reuse-2x2-partial-1",
    "heads-2",
    "wide-heads-2",
    "heads-2+reuse-1x2,2x1",
    "qk-dim-3",
    "gqa-1",
    "cla-2",
    "window-3",
    "window-40",
    "window-3-global-2",
    "window-3+reuse-2x2",
    "window-3-global-2+reuse-4x1",
    "grouped-3",
    "strided-3",
    "pool-3",
    "linformer-5",
    "linear",
    "performer-13",
    "nystrom-3",
    "nystrom-32",
    "probsparse-3",
    "skip-2",
    "gaussian-2",
    "diagonal",
    "layers-2",
]
"""Names of techniques that fit the small encoder, every one with the settings that take another way through it."""


@functools.cache
def _original(dropout: float) -> tf.ParakeetEncoder:
    torch.manual_seed(0)
    config = tf.ParakeetEncoderConfig(
        hidden_size=WIDTH, num_hidden_layers=NUM_LAYERS, num_attention_heads=NUM_HEADS, intermediate_size=48,
        num_mel_bins=16, subsampling_factor=4, subsampling_conv_channels=8, conv_kernel_size=5, layerdrop=0.0,
        dropout=dropout, activation_dropout=0.0, attention_dropout=dropout,
    )  # fmt: skip
    model = tf.ParakeetEncoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                nn.init.normal_(parameter, std=0.3)
            elif "self_attn" in name:
                nn.init.normal_(parameter, std=0.5)
    return model.eval()


def encoder(dropout: float = 0.0) -> tf.ParakeetEncoder:
    """An untouched encoder, always the same."""
    return copy.deepcopy(_original(dropout))


def compressed(name: str, dropout: float = 0.0) -> tf.ParakeetEncoder:
    """The encoder under a technique."""
    torch.manual_seed(1)
    return parse(name).apply(encoder(dropout))


@functools.cache
def unchanged(name: str) -> tf.ParakeetEncoder:
    """As `compressed`, one for all tests: for those that leave it as it is."""
    return compressed(name)


@functools.cache
@torch.no_grad()
def output(name: str) -> Tensor:
    """What that encoder makes of `batch(21, 40)`."""
    return unchanged(name)(**batch(21, 40)).last_hidden_state


def batch(*frames: int, seed: int = 0) -> dict[str, Tensor]:
    """Features of utterances of these numbers of encoder frames, padded with noise to the longest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(frames)[:, None] * 4
    features = torch.randn(len(frames), int(lengths.max()), 16, generator=generator)
    return {"input_features": features, "attention_mask": (torch.arange(features.shape[1]) < lengths).long()}


class Case:
    """One attention module of a technique, and inputs of it: hidden states of `frames` frames, padded to the longest.

    `outputs()` is what the module makes of them; `expected(context)` is what it should be, item by item, where
    `context(hidden_states, position_embeddings)` is the definition: (frames, heads · head_dim) of one utterance.
    """

    def __init__(self, name: str, *frames: int, layer: int = 0) -> None:
        model = compressed(name)
        self.attention = model.layers[layer].self_attn
        generator = torch.Generator().manual_seed(2)
        self.frames, longest = frames, max(frames)
        self.hidden_states = torch.randn(len(frames), longest, WIDTH, generator=generator)
        valid = torch.arange(longest) < torch.tensor(frames)[:, None]
        self.mask = (valid[:, :, None] & valid[:, None, :])[:, None]
        self._encode = model.encode_positions
        self.positions = self._encode(self.hidden_states)

    def outputs(self) -> list[Tensor]:
        with torch.no_grad():
            output, weights = self.attention(
                hidden_states=self.hidden_states, position_embeddings=self.positions, attention_mask=self.mask
            )
        assert weights is None
        assert output.isfinite().all()
        return [item[:frames] for item, frames in zip(output, self.frames, strict=True)]

    def expected(self, context) -> list[Tensor]:
        items = []
        with torch.no_grad():
            for item, frames in zip(self.hidden_states, self.frames, strict=True):
                hidden_states = item[:frames]
                found = context(hidden_states, self._encode(hidden_states[None])[0])
                items.append(self.attention.o_proj(found))
        return items

    def check(self, context, tolerance: float = 2e-5) -> None:
        """The module's outputs are the definition's."""
        ours, expected = self.outputs(), self.expected(context)
        scale = max(item.abs().max() for item in expected)
        for mine, theirs in zip(ours, expected, strict=True):
            error = ((mine - theirs).abs().max() / scale).item()
            assert error <= tolerance, f"{len(mine)} frames: {error}"


def by_head(projected: Tensor, heads: int = NUM_HEADS) -> Tensor:
    """(frames, width) to (heads, frames, dim)."""
    return projected.unflatten(-1, (heads, -1)).transpose(0, 1)


def joined(context: Tensor) -> Tensor:
    """(heads, frames, dim) to (frames, width)."""
    return context.transpose(0, 1).flatten(1)


def relative_map(attention: nn.Module, query, key, relative_key, scaling: float, mask=None) -> Tensor:
    """The map of full attention with relative positions, of (heads, frames, dim) each, by its reference."""
    return reference.attention_map(
        (query + attention.bias_u[:, None])[None],
        key[None],
        scaling=scaling,
        mask=None if mask is None else mask[None],
        relative_query=(query + attention.bias_v[:, None])[None],
        relative_key=relative_key[None],
    )[0]


def content_map(query: Tensor, key: Tensor) -> Tensor:
    """The map of attention without positions."""
    return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1)


def distances(frames: int) -> Tensor:
    """j − i of query i and key j."""
    places = torch.arange(frames)
    return places[None, :] - places[:, None]


def windowed_map(attention: nn.Module, hidden_states, positions, radius: int, num_global: int = 0) -> Tensor:
    """The map of a band and of global frames, between which contents alone count."""
    frames = len(hidden_states)
    apart = distances(frames)
    is_global = torch.zeros(frames, frames, dtype=torch.bool)
    is_global[:num_global], is_global[:, :num_global] = True, True
    query, key = by_head(attention.q_proj(hidden_states)), by_head(attention.k_proj(hidden_states))
    relative_key = by_head(attention.relative_k_proj(positions))[:, frames - 1 + apart]
    content = (query + attention.bias_u[:, None]) @ key.mT
    positional = torch.einsum("hid,hijd->hij", query + attention.bias_v[:, None], relative_key)
    scores = (content + positional.masked_fill(is_global, 0.0)) * HEAD_DIM**-0.5
    allowed = (apart.abs() <= radius) | is_global
    return torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1)
