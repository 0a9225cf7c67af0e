"""How is an attention map computed, carried, applied? Tensors only."""

from mapreuse.maps._attend import attend
from mapreuse.maps._carrying import STRATEGIES, compute
from mapreuse.maps._choice import Choice, Demand, choose
from mapreuse.maps._faster import is_clearly_faster
from mapreuse.maps._in_c import CORE_IN_C, are_unobserved, recorded_phases
from mapreuse.maps._map import AttentionMap, DenseMap, HeadPairs, RecomputedMap
from mapreuse.maps._scores import RelativePositions, Scores, as_index
from mapreuse.maps._shared import SharedMaps

__all__ = [
    "CORE_IN_C",
    "STRATEGIES",
    "AttentionMap",
    "Choice",
    "Demand",
    "DenseMap",
    "HeadPairs",
    "RecomputedMap",
    "RelativePositions",
    "Scores",
    "SharedMaps",
    "are_unobserved",
    "as_index",
    "attend",
    "choose",
    "compute",
    "is_clearly_faster",
    "recorded_phases",
]
