"""A sliding window: every frame attends to the frames near it, and some global ones.

    map = softmax(S) over the keys j with |i − j| ≤ R, or j < G;  a query i < G attends to all keys
    S[i, j] = ((Q[i] + u) · K[j] + (Q[i] + v) · R[i − j]) / √d,  without the positional term if i < G or j < G

with Q, K, V (H, T, d), a radius of R frames and G global frames. In a pretrained model S = Q Kᵀ / √d, with rotary
positions in Q and K; in a causal one, j ≤ i for all queries, so that the G first tokens are the sinks of Xiao et al.

Cost, in blocks of b query rows (b near R), each with the b + 2R keys that its windows span: 4·T·(b + 2R)·C FLOPs for
contents and values, 2·T·(2R + 1)·C for positions, of which only 2R + 1 are projected; global frames add 8·G·T·C.
Stored: the scores of a few blocks at a time. With reuse, a computing layer stores its band, H·T·(b + 2R + G) numbers,
and a reusing layer costs 2·T·(b + 2R + G)·C.

As in NeMo's conversion for long audio (`rel_pos_local_attn`), the global frames are the first G and use the same
projections as all others, and scores with them have no positional term. A global frame inside a window counts
once, not twice. Longformer's windows are those of full attention with absolute positions.

Papers: https://arxiv.org/abs/2004.05150 (Longformer), https://arxiv.org/abs/2305.05084 (Fast Conformer),
https://arxiv.org/abs/2309.17453 (first tokens as sinks)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import ParakeetEncoder
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

import mapreuse as mr
from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._layer_sharing import LayerSharingAttention, open_shared_maps
from mapreuse_lab.techniques._notation import layer_sources
from mapreuse_lab.techniques._pretrained import AttentionInputs, AttentionLayer, Core, LayerStore, PretrainedStack
from mapreuse_lab.techniques._technique import Technique, check_plan, wrong_depth

_MIN_ROWS, _MAX_ROWS = 32, 128
"""Query rows of a block: with fewer, products are small; with more, most keys of a block are in few windows."""
_SCORES_AT_A_TIME = 1 << 18
"""Scores that a thread computes at a time, so that they stay in its cache."""


class WindowAttention(LayerSharingAttention):
    """Attention within a window, by the layer's own map or by that of its source."""

    def __init__(self, original: ParakeetEncoderAttention, technique: Window, layer: int, plan: ReusePlan) -> None:
        super().__init__(original, technique, layer, plan)
        if self.source != layer:
            del self.q_proj, self.k_proj, self.relative_k_proj, self.bias_u, self.bias_v

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        band_map: BandMap = self.shared(lambda: self._compute(hidden_states, positions, valid), kwargs)
        return band_map.apply(self.split(self.v_proj(hidden_states)), self.dropout_p())

    def _compute(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None) -> BandMap:
        bands = _Bands.of(hidden_states.shape[1], self.technique.radius, self.technique.num_global)
        nearest = positions.shape[1] // 2
        near = positions[:, nearest - bands.radius : nearest + bands.radius + 1]
        content_query, relative_query = self.biased(self.split(self.q_proj(hidden_states)))
        return BandMap(
            bands,
            query=content_query * self.scaling,
            key=self.split(self.k_proj(hidden_states)),
            relative_query=relative_query * self.scaling,
            relative_key=self.relative_keys(near),
            valid=valid,
            keep=self.is_shared,
        )


class WindowCore(Core):
    """Attention within a window in a pretrained model, by the layer's own map or by that of its source."""

    def __init__(self, technique: Window, layer: AttentionLayer, plan: ReusePlan, store: LayerStore) -> None:
        super().__init__(technique, layer)
        self.source = layer_sources(plan)[layer.index]
        self.heads = [source[1] if source else h for h, source in enumerate(plan.heads(layer.index, layer.num_heads))]
        self.is_own, self.is_shared = self.source == layer.index, bool(plan.readers(self.source))
        self.store = store

    def forward(self, inputs: AttentionInputs) -> Tensor:
        if self.is_own:
            bands = _Bands.of(inputs.query.shape[2], self.technique.radius, self.technique.num_global)
            query, causal = inputs.query * inputs.scaling, inputs.causal
            band_map = BandMap(
                bands, query=query, key=inputs.key, valid=inputs.valid, keep=self.is_shared, causal=causal
            )
            if self.is_shared:
                self.store.tensors[self.source] = band_map
        else:
            band_map = self.store.tensors[self.source].of_heads(self.heads)
        return band_map.apply(inputs.values, inputs.dropout_p).transpose(1, 2)


@dataclass(frozen=True)
class _Bands:
    """T frames in blocks of `rows` queries, each with the `rows + 2·radius` keys that its windows span."""

    frames: int
    radius: int
    num_global: int
    rows: int

    @classmethod
    def of(cls, frames: int, radius: int, num_global: int) -> _Bands:
        radius = min(radius, frames - 1)
        rows = min(frames, max(_MIN_ROWS, min(_MAX_ROWS, radius)))
        return cls(frames, radius, min(num_global, frames), rows)

    @property
    def blocks(self) -> int:
        return -(-self.frames // self.rows)

    @property
    def keys(self) -> int:
        """Keys of a block, without global ones."""
        return self.rows + 2 * self.radius

    def chunks(self, batch: int, heads: int) -> Iterator[slice]:
        """Slices of blocks that are computed together."""
        block = batch * heads * self.rows * (self.num_global + self.keys)
        size = max(1, torch.get_num_threads() * _SCORES_AT_A_TIME // block)
        return (slice(start, min(start + size, self.blocks)) for start in range(0, self.blocks, size))

    def of_queries(
        self, tensor: Float[Tensor, "batch heads frames dim"]
    ) -> Float[Tensor, "batch heads blocks rows dim"]:
        """The queries of every block; those beyond the end are zero."""
        missing = self.blocks * self.rows - self.frames
        return functional.pad(tensor, (0, 0, 0, missing)).unflatten(2, (self.blocks, self.rows))

    def of_keys(
        self, tensor: Float[Tensor, "batch heads frames dim"]
    ) -> Float[Tensor, "batch heads blocks keys dim"]:
        """A view of the keys of every block; those beyond the ends are zero."""
        missing = self.blocks * self.rows - self.frames
        padded = functional.pad(tensor, (0, 0, self.radius, missing + self.radius))
        return padded.unfold(2, self.keys, self.rows).transpose(-1, -2)

    def with_global(self, tensor: Tensor, windows: Tensor, chunk: slice) -> Tensor:
        """The keys of a chunk's blocks, after the global ones."""
        some = windows[:, :, chunk]
        if self.num_global == 0:
            return some
        first = tensor[:, :, None, : self.num_global].expand(-1, -1, some.shape[2], -1, -1)
        return torch.cat([first, some], dim=3)


class BandMap:
    """A windowed attention map, which can be applied to the values of several layers.

    Args:
        bands: how frames are divided into blocks.
        query, relative_query: scaled queries of contents and of positions; None without relative positions.
        key: keys.
        relative_key: keys of the distances radius … −radius; None without relative positions.
        valid: True for frames that are not padding; None if there is no padding.
        keep: store the weights, because several layers apply them; otherwise `apply` computes them.
        causal: no frame attends to later ones.
    """

    def __init__(
        self,
        bands: _Bands,
        *,
        query: Float[Tensor, "batch heads frames dim"],
        key: Float[Tensor, "batch heads frames dim"],
        relative_query: Float[Tensor, "batch heads frames dim"] | None = None,
        relative_key: Float[Tensor, "positions heads near dim"] | None = None,
        valid: Bool[Tensor, "batch frames"] | None,
        keep: bool,
        causal: bool = False,
    ) -> None:
        self._bands, self._causal = bands, causal
        self._query, self._key, self._valid = query, key, valid
        self._queries, self._relative_key = bands.of_queries(query), relative_key
        self._relative_queries = None if relative_query is None else bands.of_queries(relative_query)
        self._windows = bands.of_keys(key)
        usable = query.new_ones(1, 1, bands.frames, 1) if valid is None else valid[:, None, :, None].to(query.dtype)
        usable = usable.index_fill(2, torch.arange(bands.num_global, device=query.device), 0.0)
        self._usable = bands.of_keys(usable)[..., 0] > 0
        self._kept = tuple(self._all_weights()) if keep else None

    def apply(
        self, values: Float[Tensor, "batch heads frames value_dim"], dropout_p: float
    ) -> Float[Tensor, "batch frames heads value_dim"]:
        """dropout(map, dropout_p) @ values; dropout differs from layer to layer."""
        bands = self._bands
        windows = bands.of_keys(values)
        contexts = []
        chunks = bands.chunks(*values.shape[:2])
        for chunk, weights in zip(chunks, self._kept or self._all_weights(), strict=True):
            dropped = functional.dropout(weights, dropout_p) if dropout_p > 0.0 else weights
            contexts.append(dropped @ bands.with_global(values, windows, chunk))
        context = torch.cat(contexts, dim=2).flatten(2, 3)[:, :, : bands.frames]
        if bands.num_global:
            first = self._of_global(values, dropout_p)
            context = torch.cat([first, context[:, :, bands.num_global :]], dim=2)
        return context.transpose(1, 2)

    def of_heads(self, heads: list[int]) -> BandMap:
        """The same map with its heads in another order; it must be kept."""
        chosen = copy.copy(self)
        chosen._query, chosen._key = self._query[:, heads], self._key[:, heads]
        chosen._kept = tuple(weights[:, heads] for weights in self._kept or ())
        return chosen

    def _all_weights(self) -> Iterator[Float[Tensor, "batch heads some rows keys"]]:
        """The weights of the blocks, chunk by chunk."""
        batch, heads = self._query.shape[:2]
        return (self._weights(chunk) for chunk in self._bands.chunks(batch, heads))

    def _weights(self, chunk: slice) -> Tensor:
        bands = self._bands
        if self._relative_queries is None or self._relative_key is None:
            near = self._query.new_zeros(1, 1, 1, bands.rows, 2 * bands.radius + 1)
        else:
            near = self._relative_queries[:, :, chunk] @ self._relative_key[:, :, None].mT
        lowest = torch.finfo(near.dtype).min
        if self._causal:
            near[..., bands.radius + 1 :] = lowest
        # Row r has its score of distance R at key r. In rows that are one element longer, each begins one key later.
        slanted = functional.pad(near, (0, bands.rows), value=lowest).flatten(-2)[..., : -bands.rows]
        scores = slanted.unflatten(-1, (bands.rows, bands.keys))
        scores = scores + self._queries[:, :, chunk] @ self._windows[:, :, chunk].mT
        usable = self._usable[:, :, chunk, None]
        if self._valid is not None or not usable.all():
            scores = scores.masked_fill(~usable, lowest)
        if bands.num_global:
            to_global = self._queries[:, :, chunk] @ self._key[:, :, None, : bands.num_global].mT
            if self._valid is not None:
                to_global = to_global.masked_fill(~self._valid[:, None, None, None, : bands.num_global], lowest)
            scores = torch.cat([to_global, scores], dim=-1)
        return torch.softmax(scores, dim=-1)

    def _of_global(self, values: Tensor, dropout_p: float) -> Float[Tensor, "batch heads global value_dim"]:
        """Context of the global frames, which attend to all keys."""
        mask = None if self._valid is None else self._valid[:, None, None, :]
        query = self._query[:, :, : self._bands.num_global]
        if self._causal:
            frames = self._bands.frames
            earlier = torch.ones(query.shape[2], frames, dtype=torch.bool, device=query.device).tril()
            mask = earlier if mask is None else earlier & mask
        return functional.scaled_dot_product_attention(query, self._key, values, mask, dropout_p, scale=1.0)


class Window(
    Technique,
    notation="window-{radius}[-global-{num_global}][+reuse-{plan}]",
    label="window of ±{radius}[, {num_global} global][, reuse {plan}]",
):
    """Every frame attends to the frames at most `radius` away.

    Attributes:
        radius: frames to either side.
        num_global: number of first frames that attend to all frames, and to which all frames attend.
        plan: whose map each layer applies, layer by layer; None if layers share none.
    """

    radius: int
    num_global: int = 0
    plan: ReusePlan | None = None
    source = "Beltagy, Peters & Cohan, Longformer, arXiv 2004.05150; Rekesh et al., Fast Conformer, ASRU 2023"
    attention = WindowAttention
    core = WindowCore

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plan is not None and self.plan.num_heads is not None:
            raise ValueError("whole layers reuse windows; the plan must not have head assignments")

    def check(self, encoder: ParakeetEncoder) -> None:
        if self.plan is not None:
            check_plan(encoder, self.plan, encoder.config.num_attention_heads)

    def change(self, model: nn.Module, encoder: ParakeetEncoder) -> None:
        plan = self.plan or ReusePlan.full(len(encoder.layers))
        if not plan.is_full:
            open_shared_maps(encoder)
        self.replace_attention(encoder, plan)

    def why_not(self, stack: PretrainedStack) -> str:
        return super().why_not(stack) or ("" if self.plan is None else wrong_depth(self.plan, stack))

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        """Replace attention; heads that share windows are aligned on calibration data."""
        plan, store = self.plan or ReusePlan.full(len(stack.layers)), LayerStore(stack.module)
        if self.plan is not None:
            plan = mr.align(stack.module, plan, batches)
        stack.use_interface()
        for layer in stack.layers:
            core = WindowCore(self, layer, plan, store)
            layer.use(core)
            if core.source != layer.index:
                layer.remove("query", "key")
