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
"""Names of techniques that fit the small encoder: settings that run different code. The tests that hold for every
technique run over them; add one for each new technique."""


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
    """As `compressed`, but shared by all tests, which must not change it."""
    return compressed(name)


@functools.cache
@torch.no_grad()
def output(name: str) -> Tensor:
    """That encoder's output for `batch(21, 40)`."""
    return unchanged(name)(**batch(21, 40)).last_hidden_state


def batch(*frames: int, seed: int = 0) -> dict[str, Tensor]:
    """Features of utterances with these numbers of encoder frames, padded with noise to the longest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(frames)[:, None] * 4
    features = torch.randn(len(frames), int(lengths.max()), 16, generator=generator)
    return {"input_features": features, "attention_mask": (torch.arange(features.shape[1]) < lengths).long()}


class Case:
    """One attention module of a technique, and its input: hidden states of `frames` frames, padded to the longest.

    `check(formula)` compares the module's outputs with a formula: `formula(attention, hidden_states, positions)`
    returns the context of one utterance, (frames, width).
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

    def check(self, formula, tolerance: float = 2e-5) -> None:
        with torch.no_grad():
            outputs, weights = self.attention(
                hidden_states=self.hidden_states, position_embeddings=self.positions, attention_mask=self.mask
            )
            assert weights is None
            assert outputs.isfinite().all()
            expected = [
                self.attention.o_proj(formula(self.attention, item[:frames], self._encode(item[None, :frames])[0]))
                for item, frames in zip(self.hidden_states, self.frames, strict=True)
            ]
        scale = max(item.abs().max() for item in expected)
        for output, item in zip(outputs, expected, strict=True):
            error = ((output[: len(item)] - item).abs().max() / scale).item()
            assert error <= tolerance, f"{len(item)} frames: {error}"


def by_head(projected: Tensor, heads: int = NUM_HEADS) -> Tensor:
    """(frames, width) to (heads, frames, dim)."""
    return projected.unflatten(-1, (heads, -1)).transpose(0, 1)


def joined(context: Tensor) -> Tensor:
    """(heads, frames, dim) to (frames, width)."""
    return context.transpose(0, 1).flatten(1)


def projected(attention: nn.Module, hidden_states: Tensor) -> list[Tensor]:
    """Queries, keys and values by head."""
    return [by_head(part(hidden_states)) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]


def relative_map(attention: nn.Module, query, key, relative_key, scaling: float = HEAD_DIM**-0.5) -> Tensor:
    """The map of full attention with relative positions, of (heads, frames, dim) each, by its reference."""
    return reference.attention_map(
        (query + attention.bias_u[:, None])[None],
        key[None],
        scaling=scaling,
        relative_query=(query + attention.bias_v[:, None])[None],
        relative_key=relative_key[None],
    )[0]


def full_context(attention: nn.Module, hidden_states, positions) -> Tensor:
    """The context of full attention by head."""
    query, key, values = projected(attention, hidden_states)
    return relative_map(attention, query, key, by_head(attention.relative_k_proj(positions))) @ values


def map_at_distances(attention: nn.Module, query, key, relative_key, allowed=None, unpositioned=None) -> Tensor:
    """The map whose positional term is given for each query and key: relative_key is (heads, queries, keys, dim).

    `allowed` masks pairs; pairs that are `unpositioned` have no positional term.
    """
    content = (query + attention.bias_u[:, None]) @ key.mT
    positional = torch.einsum("hid,hijd->hij", query + attention.bias_v[:, None], relative_key)
    if unpositioned is not None:
        positional = positional.masked_fill(unpositioned, 0.0)
    scores = (content + positional) * HEAD_DIM**-0.5
    return torch.softmax(scores if allowed is None else scores.masked_fill(~allowed, -torch.inf), dim=-1)


def content_map(query: Tensor, key: Tensor) -> Tensor:
    """The map of attention without positions."""
    return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1)


def distances(frames: int) -> Tensor:
    """j − i of query i and key j."""
    places = torch.arange(frames)
    return places[None, :] - places[:, None]


def windowed_map(attention: nn.Module, hidden_states, positions, radius: int, num_global: int = 0) -> Tensor:
    """The map of a band and of global frames, whose pairs are scored by contents alone."""
    frames = len(hidden_states)
    apart = distances(frames)
    is_global = torch.zeros(frames, frames, dtype=torch.bool)
    is_global[:num_global], is_global[:, :num_global] = True, True
    query, key, _ = projected(attention, hidden_states)
    relative_key = by_head(attention.relative_k_proj(positions))[:, frames - 1 + apart]
    return map_at_distances(attention, query, key, relative_key, (apart.abs() <= radius) | is_global, is_global)
