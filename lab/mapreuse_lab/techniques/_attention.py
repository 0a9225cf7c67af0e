"""What the modules have in common that stand in the place of a Parakeet layer's attention."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse.maps import RelativePositions, Scores, attend


class CompressedAttention(nn.Module):
    """Value and output projections of the original, and between them a context that a subclass makes.

    It is called as the original is, and hands back no weights. The name of its technique is kept with its weights, so
    that those of a window, say, are refused by a model whose attention is of another kind or size, or the original's.
    """

    technique: str

    def __init__(self, original: ParakeetEncoderAttention) -> None:
        super().__init__()
        self.config = original.config
        self.num_heads = original.config.num_attention_heads
        self.head_dim = original.head_dim
        self.scaling = original.scaling
        self.attention_dropout = float(original.attention_dropout)
        self.v_proj = original.v_proj
        self.o_proj = original.o_proj
        self.train(original.training)

    def get_extra_state(self) -> UInt8[Tensor, " letters"]:
        """The technique's name, in UTF-8; a tensor, as safetensors stores nothing else."""
        return torch.tensor(list(self.technique.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: UInt8[Tensor, " letters"]) -> None:
        """Raises `ValueError` where loaded weights are of another technique."""
        found = bytes(state.tolist()).decode()
        if found != self.technique:
            raise ValueError(f"weights of {found!r} do not belong in a model under {self.technique!r}")

    def forward(
        self,
        hidden_states: Float[Tensor, "batch frames width"],
        position_embeddings: Float[Tensor, "batch distances width"] | None = None,
        attention_mask: Bool[Tensor, "batch 1 frames frames"] | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch frames width"], None]:
        """Context, projected.

        Args:
            hidden_states: what the layer attends over.
            position_embeddings: encodings of the distances T − 1 … −(T − 1).
            attention_mask: True where neither query nor key is padding; None where nothing is.
            kwargs: what travels from layer to layer.
        """
        # A frame that is not padding may attend itself; reading the diagonal spares the T × T mask.
        valid = None if attention_mask is None else attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)
        if position_embeddings is not None and not (self.training and self.config.dropout_positions > 0.0):
            position_embeddings = position_embeddings[:1]  # one for the whole batch, unless dropout made them differ
        context = self.context(hidden_states, position_embeddings, valid, **kwargs)
        return self.o_proj(context.flatten(2)), None

    def context(
        self,
        hidden_states: Float[Tensor, "batch frames width"],
        position_embeddings: Float[Tensor, "positions distances width"] | None,
        valid: Bool[Tensor, "batch frames"] | None,
        **kwargs: Any,
    ) -> Float[Tensor, "batch frames heads head_dim"]:
        """What the output projection reads; `valid` is True for frames that are not padding, None where all are."""
        raise NotImplementedError

    def split(self, projected: Float[Tensor, "batch frames inner"]) -> Float[Tensor, "batch heads frames dim"]:
        """Heads of a projection, before frames."""
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def dropout_p(self) -> float:
        """Attention dropout in force."""
        return self.attention_dropout if self.training else 0.0


class ContentAttention(CompressedAttention):
    """With the original's queries and keys as well, and none of its positions.

    The content bias goes with the positional one: without positions, the query projection's own bias does its work.
    """

    def __init__(self, original: ParakeetEncoderAttention) -> None:
        super().__init__(original)
        self.q_proj = original.q_proj
        self.k_proj = original.k_proj


class RelativeAttention(ContentAttention):
    """With all parameters of the original, relative positions included."""

    def __init__(self, original: ParakeetEncoderAttention) -> None:
        super().__init__(original)
        self.relative_k_proj = original.relative_k_proj
        self.bias_u = original.bias_u
        self.bias_v = original.bias_v

    def attend_relative(
        self,
        query: Float[Tensor, "batch heads frames dim"],
        key: Float[Tensor, "batch heads frames dim"],
        values: Float[Tensor, "batch heads frames value_dim"],
        relative_key: Float[Tensor, "positions heads distances dim"],
        valid: Bool[Tensor, "batch frames"] | None,
    ) -> Float[Tensor, "batch frames heads value_dim"]:
        """Exact attention with relative positions, by the blocked core that never holds T × T scores."""
        scores = Scores(
            query=query + self.bias_u[:, None],
            key=key,
            scaling=query.shape[-1] ** -0.5,
            mask=square_mask(valid),
            relative=RelativePositions(query=query + self.bias_v[:, None], key=relative_key),
        )
        return attend(scores.to(values.dtype), values, keep=False, dropout_p=self.dropout_p())[0].transpose(1, 2)


def square_mask(
    valid: Bool[Tensor, "batch frames"] | None,
) -> Bool[Tensor, "batch 1 frames frames"] | None:
    """True where neither query nor key is padding."""
    return None if valid is None else (valid[:, :, None] & valid[:, None, :])[:, None]
