"""Everything that is measured of a model's maps, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from mapreuse.measure._concentration import Concentration, check_epsilon, summed_shares
from mapreuse.measure._config import Progress
from mapreuse.measure._diagonality import Diagonality, diagonality_of, summed_diagonality
from mapreuse.measure._entropy import Entropy, summed_entropy
from mapreuse.measure._over_queries import mean_over_queries
from mapreuse.measure._similarity import Similarity, summed_similarity


@dataclass(frozen=True)
class Analysis:
    """What a model's attention maps are like, layer by layer and head by head.

    Attributes:
        similarity: how alike every two of them are; which layers may share a map.
        entropy: how widely they spread.
        diagonality: how near the diagonal they lie.
        concentration: which share of the keys they need; what storing them sparsely would save.
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
    progress: Progress = lambda doing, done, total: None,
) -> Analysis:
    """Similarity, entropy, diagonality and concentration of all maps of `model`; every batch is run once.

    Args:
        model: a model that `apply` accepts; it is left as it is.
        batches: keyword dictionaries for the model's forward.
        epsilon, block_rows: as for `concentration`.
        progress: called after every batch with its number, twice, and the number of batches where it is known.

    Raises:
        ValueError: where there are no batches, a map is not finite, or epsilon is not between 0 and 1.
    """
    check_epsilon(epsilon)
    shares = partial(summed_shares, epsilon=epsilon, block_rows=block_rows)
    measures = (summed_similarity, summed_entropy, summed_diagonality, shares)
    (alike, entropies, near, kept), num_queries = mean_over_queries(model, batches, *measures, progress=progress)
    return Analysis(
        Similarity(alike, num_queries),
        Entropy(*entropies),
        diagonality_of(near),
        Concentration(kept, epsilon, block_rows),
    )
