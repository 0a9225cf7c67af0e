"""FLOPs and bytes of each part of a Parakeet encoder's forward pass, by formula.

Symbols: B batch, T encoder frames, N = B·T, C width, H heads, d head dimension, D = 2·T − 1 distances, c heads of a
layer that compute their own map. Elements times the bytes of a number are bytes.

FLOPs are those of matrix products and convolutions, two for a multiplication with its addition, as
`torch.utils.flop_counter` counts them; what works element by element counts none, and shows in bytes and time.

Bytes are what a part's operators read and write: each operand and each result once, parameters included. Scores that
mapreuse computes block by block stay in cache and are not counted. Copies that a library makes inside an operator on
its own account are not counted either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import ParakeetEncoder

from mapreuse.models import applied_plans, find_stack, plan_of

PARTS = {
    "query": "query projection",
    "key": "key projection",
    "value": "value projection",
    "positions": "positional projection",
    "positional_scores": "positional scores + shift",
    "scores": "content scores",
    "softmax": "softmax",
    "context": "map × values",
    "fused": "scores, softmax, map × values (fused)",
    "output": "output projection",
    "feed_forward": "feed-forward",
    "convolution": "convolution",
    "norms": "norms",
    "subsampling": "subsampling",
    "rest": "the rest",
}
"""The parts of a forward pass, and how they are shown. "fused" is one operator that cannot be taken apart."""


@dataclass(frozen=True)
class Work:
    """Arithmetic and memory traffic.

    Attributes:
        flops: of matrix products and convolutions.
        nbytes: read and written.
    """

    flops: int = 0
    nbytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)


@dataclass(frozen=True)
class _Size:
    """The symbols of this file's formulas."""

    batch: int
    frames: int
    width: int
    heads: int
    head_dim: int
    itemsize: int

    @property
    def rows(self) -> int:
        return self.batch * self.frames

    @property
    def distances(self) -> int:
        return 2 * self.frames - 1


def encoder_work(
    encoder: ParakeetEncoder, frames: int, batch: int = 1
) -> tuple[dict[str, Work], list[dict[str, Work]]]:
    """Work outside the layers, and of each layer, by part; inputs without padding, evaluation mode.

    Raises `ValueError` where the encoder's attention is of a kind that has no formula here.
    """
    config = encoder.config
    num_layers = len(encoder.layers)
    size = _Size(
        batch=batch,
        frames=frames,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        head_dim=getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        itemsize=encoder.dtype.itemsize,
    )
    outside = {
        "subsampling": _subsampling(
            encoder.subsampling, size, frames * config.subsampling_factor, config.num_mel_bins
        ),
        "positions": _encode_positions(size),
        "rest": Work(nbytes=size.itemsize * 2 * size.rows * size.width),  # the input's scale
    }
    return outside, [_layer(encoder, layer, size) for layer in range(num_layers)]


def _layer(encoder: ParakeetEncoder, layer: int, size: _Size) -> dict[str, Work]:
    block = encoder.layers[layer]
    norms = (module for module in block.children() if isinstance(module, nn.LayerNorm))
    return {
        **_projections(encoder, layer, size),
        **_core(encoder, layer, size),
        "feed_forward": _feed_forward(block.feed_forward1, size) + _feed_forward(block.feed_forward2, size),
        "convolution": _convolution(block.conv, size),
        "norms": sum((_norm(norm, size) for norm in norms), Work()),
        "rest": _residuals(size),
    }


def _projections(encoder: ParakeetEncoder, layer: int, size: _Size) -> dict[str, Work]:
    """Query, key, value and output: a linear layer each, as wide as the heads that still need it.

    The query is also read twice and written twice, to add its two biases. Positions: a linear layer on D rows, once
    for the batch under a plan, for each of its items (B·D rows) in `transformers`.
    """
    modules: dict[str, Any] = find_stack(encoder).layers[layer].attention._modules
    names = {
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "positions": "relative_k_proj",
        "output": "o_proj",
    }
    copies = size.batch if plan_of(encoder) is None else 1
    work = {}
    for part, name in names.items():
        rows = copies * size.distances if part == "positions" else size.rows
        module = modules.get(name)
        work[part] = Work() if module is None else _linear(module, rows, size.itemsize)
    query = modules.get("q_proj")
    if query is not None:
        width = query.weight.shape[0]
        work["query"] += Work(nbytes=size.itemsize * (4 * size.rows * width + 2 * width))
    return work


def _core(encoder: ParakeetEncoder, layer: int, size: _Size) -> dict[str, Work]:
    plan = plan_of(encoder)
    if plan is not None:
        heads = plan.heads(layer, size.heads)
        sources = [source for source in heads if source is not None]
        (applied,) = applied_plans(encoder).values()
        storage = applied.storage
        if storage not in ("dense", "recompute"):
            raise ValueError(f"breakdown has no formula for maps carried by storage {storage!r}")
        readers = [plan.heads(reader, size.heads) for reader in plan.readers(layer)]
        published = {source for theirs in readers for source in theirs if source is not None and source[0] == layer}
        own = _blocked_core(size, len(heads) - len(sources), len(published) if storage == "dense" else 0)
        if storage == "dense":
            reused = {"context": _apply_map(size, len(sources), len(set(sources)))}
        else:
            reused = _blocked_core(size, len(sources), kept=0)
        return {part: own.get(part, Work()) + reused.get(part, Work()) for part in own | reused}
    implementation = encoder.config._attn_implementation
    if implementation == "eager":
        return _eager_core(size)
    if implementation == "sdpa":
        return _fused_core(size)
    raise ValueError(f"breakdown knows attention by eager and sdpa, not {implementation!r}")


def _blocked_core(size: _Size, heads: int, kept: int) -> dict[str, Work]:
    """Scores and context of c heads, by blocks of query rows.

    FLOPs: 2·B·c·T²·d each for scores, positional scores and context: of the positional products only those that the
    shift keeps (the fringe of a block, a few columns, is left out). Elements: positional scores read B·c·T·d queries
    and c·D·d positional keys; scores read 2·B·c·T·d; the softmax writes the map of the k heads that other layers
    read, B·k·T², and nothing else that leaves the cache; the context reads values and writes, 2·B·c·T·d.
    """
    vectors = size.batch * heads * size.frames * size.head_dim
    product = 2 * vectors * size.frames
    e = size.itemsize
    return {
        "positional_scores": Work(product, e * (vectors + heads * size.distances * size.head_dim)),
        "scores": Work(product, e * 2 * vectors),
        "softmax": Work(0, e * size.batch * kept * size.frames**2),
        "context": Work(product, e * 2 * vectors),
    }


def _apply_map(size: _Size, heads: int, sources: int) -> Work:
    """r heads that apply the maps of s source heads: 2·B·r·T²·d FLOPs; B·s·T² read, 2·B·r·T·d read and written."""
    vectors = size.batch * heads * size.frames * size.head_dim
    nbytes = size.itemsize * (size.batch * sources * size.frames**2 + 2 * vectors)
    return Work(2 * vectors * size.frames, nbytes)


def _eager_core(size: _Size) -> dict[str, Work]:
    """`transformers`' eager attention: every operator reads and writes whole tensors of scores.

    FLOPs: 2·B·H·T·D·d for the positional scores, 2·B·H·T²·d each for scores and context. Elements for each of the B·H
    heads: positional scores T·d + D·d + T·D (product), T·D + 2·T² (pad), 2·T² (scaling); scores 2·T·d + T² (product),
    2·T² (scaling), 3·T² (adding the positional scores); softmax 2·T²; context T² + 2·T·d, and 2·T·d to put it into
    the layout of the output projection.
    """
    return {
        "positional_scores": _positional_scores(size),
        "scores": _times_heads(size, 2 * size.frames**2 * size.head_dim, _content_elements(size)),
        "softmax": _times_heads(size, 0, 2 * size.frames**2),
        "context": _times_heads(
            size, 2 * size.frames**2 * size.head_dim, size.frames**2 + 4 * size.frames * size.head_dim
        ),
    }


def _fused_core(size: _Size) -> dict[str, Work]:
    """`transformers` with fused attention: the positional scores are handed over whole, as an additive mask.

    FLOPs: 2·B·H·T·D·d for the positional scores, 4·B·H·T²·d fused. Elements: positional scores as for eager; fused,
    for each of B·H heads, T² read and 4·T·d read and written.
    """
    fused = size.frames**2 + 4 * size.frames * size.head_dim
    return {
        "positional_scores": _positional_scores(size),
        "fused": _times_heads(size, 4 * size.frames**2 * size.head_dim, fused),
    }


def _positional_scores(size: _Size) -> Work:
    frames, distances = size.frames, size.distances
    product = frames * size.head_dim + distances * size.head_dim + frames * distances
    elements = product + frames * distances + 4 * frames**2
    return _times_heads(size, 2 * frames * distances * size.head_dim, elements)


def _content_elements(size: _Size) -> int:
    return 2 * size.frames * size.head_dim + 6 * size.frames**2


def _times_heads(size: _Size, flops: int, elements: int) -> Work:
    times = size.batch * size.heads
    return Work(times * flops, times * size.itemsize * elements)


def _linear(module: Any, rows: int, itemsize: int) -> Work:
    """A linear layer on n rows: 2·n·in·out FLOPs; n·(in + out) + in·out + out elements."""
    num_outputs, num_inputs = module.weight.shape
    elements = rows * (num_inputs + num_outputs) + _parameters(module)
    return Work(2 * rows * num_inputs * num_outputs, itemsize * elements)


def _feed_forward(module: Any, size: _Size) -> Work:
    """Two linear layers and between them an activation that reads and writes N·I elements (I inner width)."""
    inner = module.linear1.weight.shape[0]
    linear = _linear(module.linear1, size.rows, size.itemsize) + _linear(module.linear2, size.rows, size.itemsize)
    return linear + Work(nbytes=size.itemsize * 2 * size.rows * inner)


def _convolution(module: Any, size: _Size) -> Work:
    """Pointwise to 2·C, gate, depthwise of k taps, batch norm, activation, pointwise.

    FLOPs: 2·N·(2·C² + k·C + C²). Elements: N·C times 3 (pointwise), 3 (gate), 2 (depthwise), 2 (norm), 2 (activation)
    and 2 (pointwise), and the parameters, the norm's running mean and variance among them.
    """
    convolutions = [child for child in module.children() if isinstance(child, nn.Conv1d)]
    flops = 2 * size.rows * sum(convolution.weight.numel() for convolution in convolutions)
    statistics = 2 * size.width
    elements = 14 * size.rows * size.width + _parameters(module) + statistics
    return Work(flops, size.itemsize * elements)


def _norm(module: Any, size: _Size) -> Work:
    """A layer norm reads and writes N·C elements, and reads 2·C parameters."""
    return Work(nbytes=size.itemsize * (2 * size.rows * size.width + _parameters(module)))


def _residuals(size: _Size) -> Work:
    """Four residual sums of 3·N·C elements, and the halves of the two feed-forward outputs, 2·N·C each."""
    return Work(nbytes=size.itemsize * 16 * size.rows * size.width)


def _encode_positions(size: _Size) -> Work:
    """D·C/2 angles; their sine and cosine for each batch item, read and written, then interleaved: 4·B·D·C."""
    elements = size.distances * size.width // 2 + 4 * size.batch * size.distances * size.width
    return Work(nbytes=size.itemsize * elements)


def _subsampling(module: Any, size: _Size, input_frames: int, mels: int) -> Work:
    """Convolutions over time and frequency, an activation after each stage, one copy, and a linear layer.

    A convolution with w weights and h × v results per channel: 2·B·h·v·w FLOPs; its input, output and parameters. An
    activation reads and writes its input. The copy puts the channels of a frame side by side.
    """
    height, width, channels = input_frames, mels, 1
    flops = elements = 0
    for layer in module.layers:
        before = size.batch * channels * height * width
        if isinstance(layer, nn.Conv2d):
            padding: Any = layer.padding
            height, width = (
                (length + 2 * padding[axis] - layer.kernel_size[axis]) // layer.stride[axis] + 1
                for axis, length in enumerate((height, width))
            )
            channels = layer.out_channels
            flops += 2 * size.batch * height * width * layer.weight.numel()
            elements += _parameters(layer)
        elements += before + size.batch * channels * height * width
    elements += 2 * size.batch * channels * height * width
    return Work(flops, size.itemsize * elements) + _linear(module.linear, size.batch * height, size.itemsize)


def _parameters(module: Any) -> int:
    return sum(math.prod(parameter.shape) for parameter in module.parameters())
