"""Base classes of the modules that replace a Parakeet layer's attention.

A technique derives from the one that keeps the projections it needs, and defines `context`.

    CompressedAttention    values and output                           fixed maps
    ContentAttention       also queries and keys                       attention without positions
    RelativeAttention      also relative positions (the original's)    full attention, unless `context` is overridden
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse.maps import RelativePositions, Scores, attend
from mapreuse_lab.techniques._technique import Technique


class CompressedAttention(nn.Module):
    """The original's value and output projections; between them, a context that the subclass computes.

    It is called like the original and returns no weights. Its state includes the technique's name, so that weights of
    one technique cannot be loaded into a model under another.

    Args:
        original: the module that it replaces, whose projections it takes over.
        technique: the technique, with its settings.
        layer: index of the layer.
    """

    positions: ClassVar[str] = "none"
    technique: Any

    def __init__(self, original: ParakeetEncoderAttention, technique: Technique, layer: int) -> None:
        super().__init__()
        self.technique = technique
        self.layer = layer
        self.config = original.config
        self.num_heads = original.config.num_attention_heads
        self.head_dim = original.head_dim
        self.scaling = original.scaling
        self.attention_dropout = float(original.attention_dropout)
        self.v_proj = original.v_proj
        self.o_proj = original.o_proj
        self.train(original.training)

    def get_extra_state(self) -> UInt8[Tensor, " letters"]:
        """The technique's name in UTF-8, as a tensor: safetensors stores nothing else."""
        return torch.tensor(list(self.technique.name.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: UInt8[Tensor, " letters"]) -> None:
        """Raises `ValueError` if the loaded weights are those of another technique."""
        found = bytes(state.tolist()).decode()
        if found != self.technique.name:
            raise ValueError(f"weights of {found!r} do not belong in a model under {self.technique.name!r}")

    def forward(
        self,
        hidden_states: Float[Tensor, "batch frames width"],
        position_embeddings: Float[Tensor, "positions distances width"],
        attention_mask: Bool[Tensor, "batch 1 frames frames"] | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch frames width"], None]:
        """The layer's context, projected; see `context`.

        Args:
            hidden_states: the layer's input.
            position_embeddings: encodings of the distances T − 1 … −(T − 1).
            attention_mask: True if neither query nor key is padding; None if there is no padding.
            kwargs: the other arguments that the encoder passes to its layers.
        """
        # A frame that is not padding may attend to itself, so the diagonal of the T × T mask suffices.
        valid = None if attention_mask is None else attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)
        if not (self.training and self.config.dropout_positions > 0.0):
            position_embeddings = position_embeddings[:1]  # one for the whole batch, unless dropout made them differ
        context = self.context(hidden_states, position_embeddings, valid, **kwargs)
        return self.o_proj(context.flatten(2)), None

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        """Weighted means of values, which the output projection reads; a subclass defines it.

        Args:
            hidden_states: (batch, frames, width).
            positions: encodings of distances, (1 or batch, 2·frames − 1, width).
            valid: (batch, frames), True for frames that are not padding; None if there is no padding.
            kwargs: the other arguments that the encoder passes to its layers.

        Returns:
            (batch, frames, heads, head_dim).
        """
        raise NotImplementedError

    def split(self, projected: Float[Tensor, "batch frames inner"]) -> Float[Tensor, "batch heads frames dim"]:
        """The heads of a projection."""
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def dropout_p(self) -> float:
        """Probability of attention dropout: 0 outside training."""
        return self.attention_dropout if self.training else 0.0


class ContentAttention(CompressedAttention):
    """Also the original's queries and keys, without its positions.

    The bias of contents is left out too: without positions, the query projection's own bias has the same effect.
    """

    positions = "dropped"

    def __init__(self, original: ParakeetEncoderAttention, technique: Technique, layer: int) -> None:
        super().__init__(original, technique, layer)
        self.q_proj = original.q_proj
        self.k_proj = original.k_proj

    def project(self, hidden_states: Float[Tensor, "batch frames width"]) -> list[Tensor]:
        """Queries, keys and values, (batch, heads, frames, dim) each."""
        return [self.split(projection(hidden_states)) for projection in (self.q_proj, self.k_proj, self.v_proj)]


class RelativeAttention(ContentAttention):
    """All of the original's parameters, relative positions included.

    context = softmax(((Q + u) Kᵀ + shift((Q + v) Rᵀ)) / √d) V
    """

    positions = "kept"

    def __init__(self, original: ParakeetEncoderAttention, technique: Technique, layer: int) -> None:
        super().__init__(original, technique, layer)
        self.relative_k_proj = original.relative_k_proj
        self.bias_u = original.bias_u
        self.bias_v = original.bias_v

    def context(self, hidden_states: Tensor, positions: Tensor, valid: Tensor | None, **kwargs: Any) -> Tensor:
        query, key, values = self.project(hidden_states)
        return self.attend_relative(self.biased(query), key, values, self.relative_keys(positions), valid)

    def relative_keys(
        self, positions: Float[Tensor, "positions distances width"]
    ) -> Float[Tensor, "positions heads distances dim"]:
        """R: the keys of distances."""
        return self.split(self.relative_k_proj(positions))

    def biased(self, query: Float[Tensor, "batch heads *frames dim"]) -> tuple[Tensor, Tensor]:
        """Q + u, which meets keys, and Q + v, which meets the keys of distances."""
        shape = (self.num_heads, *(1,) * (query.dim() - 3), -1)
        return query + self.bias_u.view(shape), query + self.bias_v.view(shape)

    def attend_relative(
        self,
        queries: tuple[Float[Tensor, "batch heads frames dim"], Float[Tensor, "batch heads frames dim"]],
        key: Float[Tensor, "batch heads frames dim"],
        values: Float[Tensor, "batch heads frames value_dim"],
        relative_key: Float[Tensor, "positions heads distances dim"],
        valid: Bool[Tensor, "batch frames"] | None,
    ) -> Float[Tensor, "batch frames heads value_dim"]:
        """Exact attention with relative positions, in blocks: no T × T tensor is stored.

        Args:
            queries: Q + u and Q + v, as `biased` returns them.
            key: keys.
            values: values.
            relative_key: keys of the distances T − 1 … −(T − 1).
            valid: True for frames that are not padding; None if there is no padding.
        """
        query, relative_query = queries
        scores = Scores(
            query=query,
            key=key,
            scaling=query.shape[-1] ** -0.5,
            mask=None if valid is None else (valid[:, :, None] & valid[:, None, :])[:, None],
            relative=RelativePositions(query=relative_query, key=relative_key),
        )
        context, _ = attend(scores.to(values.dtype), values, keep=False, dropout_p=self.dropout_p())
        return context.transpose(1, 2)
