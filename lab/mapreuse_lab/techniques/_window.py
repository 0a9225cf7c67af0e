"""A sliding window: every frame attends the frames near it, and some global ones.

    map = softmax(S) over the keys j with |i − j| ≤ R, or j < G;  a query i < G attends all keys
    S[i, j] = ((Q[i] + u) · K[j] + (Q[i] + v) · R[i − j]) / √d,  without the positional term where i < G or j < G

Cost, in blocks of b query rows (b near R), each with the b + 2R keys that its windows span: 4·T·(b + 2R)·C FLOPs for
contents and values, 2·T·(2R + 1)·C for positions, of which only 2R + 1 are projected; global frames add 8·G·T·C.
Stored: the scores of a few blocks at a time. With reuse, a computing layer keeps its band, H·T·(b + 2R + G) numbers,
and a reusing layer's cost is 2·T·(b + 2R + G)·C.

As in NeMo's conversion for long audio (`rel_pos_local_attn`), the global frames are the first G, use the projections
of all others, and scores with them have no positional term; a global frame inside a window is attended once, not
twice. Longformer's windows are those of full attention with absolute positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._attention import CompressedAttention, RelativeAttention
from mapreuse_lab.techniques._encoder import check_plan, replace_attention, untouched_encoder
from mapreuse_lab.techniques._handing import publish, published
from mapreuse_lab.techniques._reuse import PLAN, describe, notation
from mapreuse_lab.techniques._technique import Model, check_at_least_one, register

_FEWEST_ROWS, _MOST_ROWS = 32, 128
"""Query rows of a block: fewer, and products are small; more, and most keys of a block are in few windows."""
_SCORES_AT_A_TIME = 1 << 18
"""For every thread: what is computed at a time stays in its cache."""


@register(
    "window-R[-global-G][+reuse-PLAN]", rf"window-(?P<radius>\d+)(-global-(?P<num_global>\d+))?(\+reuse-{PLAN})?"
)
@dataclass(frozen=True)
class Window:
    """Every frame attends those at most `radius` away.

    Attributes:
        radius: frames to either side.
        num_global: this many first frames attend all, and are attended by all.
        plan: whose maps layers apply, if they share any, layer by layer.
    """

    radius: int
    num_global: int = 0
    plan: ReusePlan | None = None
    positions: ClassVar[str] = "kept"

    def __post_init__(self) -> None:
        check_at_least_one(radius=self.radius)
        if self.plan is not None and self.plan.num_heads is not None:
            raise ValueError("windows are reused by whole layers, but the plan speaks of heads")

    @property
    def name(self) -> str:
        with_global = f"-global-{self.num_global}" if self.num_global else ""
        reuse = "" if self.plan is None else f"+reuse-{notation(self.plan)}"
        return f"window-{self.radius}{with_global}{reuse}"

    @property
    def title(self) -> str:
        with_global = f", {self.num_global} global" if self.num_global else ""
        reuse = "" if self.plan is None else f", reuse {describe(self.plan)}"
        return f"window of ±{self.radius}{with_global}{reuse}"

    @property
    def source(self) -> str:
        return "Beltagy, Peters & Cohan, Longformer, arXiv 2004.05150; Rekesh et al., Fast Conformer, ASRU 2023"

    def apply(self, model: Model) -> Model:
        encoder = untouched_encoder(model)
        plan = self.plan or ReusePlan.full(len(encoder.layers))
        check_plan(encoder, plan, encoder.config.num_attention_heads)
        if not plan.is_full:
            publish(encoder, [(*plan.sources(layer), layer)[0] for layer in range(plan.num_layers)])
        replace_attention(
            encoder,
            self.name,
            lambda layer, original: (
                ReusingWindowAttention(original, layer, plan.sources(layer)[0])
                if plan.reuses(layer)
                else WindowAttention(original, self.radius, self.num_global, layer if plan.readers(layer) else None)
            ),
        )
        return model


class WindowAttention(RelativeAttention):
    """Attention within a window; `shared_as` is the layer's index where later layers apply its map."""

    def __init__(
        self, original: ParakeetEncoderAttention, radius: int, num_global: int, shared_as: int | None
    ) -> None:
        super().__init__(original)
        self.radius, self.num_global, self.shared_as = radius, num_global, shared_as

    def context(
        self, hidden_states: Tensor, position_embeddings: Tensor | None, valid: Tensor | None, **kwargs: Any
    ) -> Tensor:
        assert position_embeddings is not None
        bands = _Bands.of(hidden_states.shape[1], self.radius, self.num_global)
        nearest = position_embeddings.shape[1] // 2
        near = position_embeddings[:, nearest - bands.radius : nearest + bands.radius + 1]
        query = self.split(self.q_proj(hidden_states))
        scores = _BandScores(
            bands,
            query=(query + self.bias_u[:, None]) * self.scaling,
            key=self.split(self.k_proj(hidden_states)),
            relative_query=(query + self.bias_v[:, None]) * self.scaling,
            relative_key=self.split(self.relative_k_proj(near)),
            valid=valid,
        )
        band_map = BandMap(bands, tuple(scores.weights()) if self.shared_as is not None else None, scores)
        if self.shared_as is not None:
            published(self.shared_as, kwargs).put(self.shared_as, band_map)
        return band_map.apply(self.split(self.v_proj(hidden_states)), self.dropout_p())


class ReusingWindowAttention(CompressedAttention):
    """Attention of layer `layer` by the windowed map of layer `source`."""

    def __init__(self, original: ParakeetEncoderAttention, layer: int, source: int) -> None:
        super().__init__(original)
        self.layer, self.source = layer, source

    def context(
        self, hidden_states: Tensor, position_embeddings: Tensor | None, valid: Tensor | None, **kwargs: Any
    ) -> Tensor:
        band_map: BandMap = published(self.layer, kwargs).get(self.source, self.layer)
        return band_map.apply(self.split(self.v_proj(hidden_states)), self.dropout_p())


@dataclass(frozen=True)
class _Bands:
    """How T frames are cut into blocks of `rows` queries, each with the `rows + 2·radius` keys that they may see."""

    frames: int
    radius: int
    num_global: int
    rows: int

    @classmethod
    def of(cls, frames: int, radius: int, num_global: int) -> _Bands:
        radius = min(radius, frames - 1)
        rows = min(frames, max(_FEWEST_ROWS, min(_MOST_ROWS, radius)))
        return cls(frames, radius, min(num_global, frames), rows)

    @property
    def blocks(self) -> int:
        return -(-self.frames // self.rows)

    @property
    def keys(self) -> int:
        """Keys of a block, global ones left aside."""
        return self.rows + 2 * self.radius

    def chunks(self, batch: int, heads: int) -> Iterator[slice]:
        """Blocks that are computed at a time."""
        block = batch * heads * self.rows * (self.num_global + self.keys)
        size = max(1, torch.get_num_threads() * _SCORES_AT_A_TIME // block)
        return (slice(start, min(start + size, self.blocks)) for start in range(0, self.blocks, size))

    def of_queries(
        self, tensor: Float[Tensor, "batch heads frames dim"]
    ) -> Float[Tensor, "batch heads blocks rows dim"]:
        """The queries of every block; missing ones of the last are zero."""
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
        """The keys of a chunk's blocks, the global ones before them."""
        some = windows[:, :, chunk]
        if self.num_global == 0:
            return some
        first = tensor[:, :, None, : self.num_global].expand(-1, -1, some.shape[2], -1, -1)
        return torch.cat([first, some], dim=3)


class _BandScores:
    """Scores of the windows, from which the weights of any blocks are computed."""

    def __init__(
        self,
        bands: _Bands,
        *,
        query: Float[Tensor, "batch heads frames dim"],
        key: Float[Tensor, "batch heads frames dim"],
        relative_query: Float[Tensor, "batch heads frames dim"],
        relative_key: Float[Tensor, "positions heads near dim"],
        valid: Bool[Tensor, "batch frames"] | None,
    ) -> None:
        self._bands = bands
        self._query, self._key, self._valid = query, key, valid
        self._queries, self._relative_queries = bands.of_queries(query), bands.of_queries(relative_query)
        self._relative_key = relative_key
        self._windows = bands.of_keys(key)
        usable = query.new_ones(1, 1, bands.frames, 1) if valid is None else valid[:, None, :, None].to(query.dtype)
        usable = usable.index_fill(2, torch.arange(bands.num_global, device=query.device), 0.0)
        self._usable = bands.of_keys(usable)[..., 0] > 0

    def weights(self) -> Iterator[Float[Tensor, "batch heads some rows keys"]]:
        """Of one chunk of blocks after another."""
        batch, heads = self._query.shape[:2]
        return (self._weights(chunk) for chunk in self._bands.chunks(batch, heads))

    def _weights(self, chunk: slice) -> Tensor:
        bands = self._bands
        near = self._relative_queries[:, :, chunk] @ self._relative_key[:, :, None].mT
        lowest = torch.finfo(near.dtype).min
        # Row r has the score of distance R at key r: rows one element longer than they are begin one key later each.
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

    def of_global(self, values: Tensor, dropout_p: float) -> Float[Tensor, "batch heads global value_dim"]:
        """Context of the global frames, which attend all."""
        mask = None if self._valid is None else self._valid[:, None, None, :]
        query = self._query[:, :, : self._bands.num_global]
        return functional.scaled_dot_product_attention(query, self._key, values, mask, dropout_p, scale=1.0)


@dataclass(frozen=True)
class BandMap:
    """A windowed attention map that can be applied to the values of several layers.

    Attributes:
        bands: its geometry.
        kept: its weights, where several layers apply them; None where they are computed as they are applied.
        scores: what it is the softmax of.
    """

    bands: _Bands
    kept: tuple[Tensor, ...] | None
    scores: _BandScores

    def apply(
        self, values: Float[Tensor, "batch heads frames value_dim"], dropout_p: float
    ) -> Float[Tensor, "batch frames heads value_dim"]:
        """dropout(map, dropout_p) @ values, dropout drawn anew."""
        bands = self.bands
        windows = bands.of_keys(values)
        contexts = []
        chunks = bands.chunks(*values.shape[:2])
        for chunk, weights in zip(chunks, self.kept or self.scores.weights(), strict=True):
            dropped = functional.dropout(weights, dropout_p) if dropout_p > 0.0 else weights
            contexts.append(dropped @ bands.with_global(values, windows, chunk))
        context = torch.cat(contexts, dim=2).flatten(2, 3)[:, :, : bands.frames]
        if bands.num_global:
            first = self.scores.of_global(values, dropout_p)
            context = torch.cat([first, context[:, :, bands.num_global :]], dim=2)
        return context.transpose(1, 2)
