"""All measures of a model's attention maps, in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from mapreuse.console import ProgressCallback
from mapreuse.measure._concentration import Concentration, check_epsilon, summed_shares
from mapreuse.measure._diagonality import Diagonality, diagonality_of, summed_diagonality
from mapreuse.measure._entropy import Entropy, summed_entropy
from mapreuse.measure._over_queries import mean_over_queries
from mapreuse.measure._similarity import Similarity, summed_similarity


@dataclass(frozen=True)
class Analysis:
    """Properties of a model's attention maps, by layer and head.

    Attributes:
        similarity: similarity of each pair of maps. It shows which layers can share a map.
        entropy: how widely queries spread their attention.
        diagonality: how close to the diagonal the attention is.
        concentration: which share of the keys a map needs. It shows what sparse storage would save.
    """

    similarity: Similarity
    entropy: Entropy
    diagonality: Diagonality
    concentration: Concentration


def analyze(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    epsilon: float = 0.02,
    block_rows: int = 64,
    progress: ProgressCallback = lambda doing, done, total: None,
) -> Analysis:
    """Similarity, entropy, diagonality and concentration of all maps of `model`. Each batch runs once.

    Args:
        model: a model that `apply` accepts. It is not changed.
        batches: keyword dictionaries for the model's forward.
        epsilon: see `Concentration`.
        block_rows: see `Concentration`.
        progress: called after each batch with its number and the number of batches.

    Raises:
        ValueError: if there are no batches, a map is not finite, or epsilon is not between 0 and 1.
    """
    check_epsilon(epsilon)
    shares = partial(summed_shares, epsilon=epsilon, block_rows=block_rows)
    measures = (summed_similarity, summed_entropy, summed_diagonality, shares)
    means, num_queries = mean_over_queries(model, batches, *measures, progress=progress)
    similarities, entropies, diagonalities, concentrations = means
    return Analysis(
        Similarity(similarities, num_queries),
        Entropy(*entropies),
        diagonality_of(diagonalities),
        Concentration(concentrations, epsilon, block_rows),
    )
