"""How is an attention map computed, carried, applied? Tensors only."""

from mapreuse.maps._attend import attend
from mapreuse.maps._c_kernel import HAS_C_KERNEL, are_unobserved, recorded_phases
from mapreuse.maps._map import AttentionMap, DenseMap, HeadPairs, RecomputedMap
from mapreuse.maps._microbenchmark import is_clearly_faster
from mapreuse.maps._scores import RelativePositions, Scores, as_index
from mapreuse.maps._shared import SharedMaps
from mapreuse.maps._storage import STORAGES, compute
from mapreuse.maps._storage_choice import Choice, Demand, choose

__all__ = [
    "HAS_C_KERNEL",
    "STORAGES",
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
