"""How is an attention map computed, stored and applied? Tensors only."""

from mapreuse.maps._attend import attend, attend_step, is_clearly_faster
from mapreuse.maps._c_kernel import KERNEL_RANGE, recorded_phases
from mapreuse.maps._grouped_heads import repeated, with_all_heads
from mapreuse.maps._map import AttentionMap, DenseMap, HeadPairs, RecomputedMap
from mapreuse.maps._operators import needs_plain_operators, plain_operators, products_of
from mapreuse.maps._runtime_operators import runtime_operators
from mapreuse.maps._scores import RelativePositions, Scores, as_index
from mapreuse.maps._shared_keys import KeySettings, SharedKeys, compute_keys, keys_of_map
from mapreuse.maps._shared_maps import SharedMaps
from mapreuse.maps._shared_scores import SharedScores, rotated
from mapreuse.maps._storage import STORAGES, compute
from mapreuse.maps._storage_choice import MapCounts, StorageChoice

__all__ = [
    "KERNEL_RANGE",
    "STORAGES",
    "AttentionMap",
    "DenseMap",
    "HeadPairs",
    "KeySettings",
    "MapCounts",
    "RecomputedMap",
    "RelativePositions",
    "Scores",
    "SharedKeys",
    "SharedMaps",
    "SharedScores",
    "StorageChoice",
    "as_index",
    "attend",
    "attend_step",
    "compute",
    "compute_keys",
    "is_clearly_faster",
    "keys_of_map",
    "needs_plain_operators",
    "plain_operators",
    "products_of",
    "recorded_phases",
    "repeated",
    "rotated",
    "runtime_operators",
    "with_all_heads",
]
