"""What else could compress this attention? The contestants of the comparison, reuse among them."""

from mapreuse.techniques._cross_layer import CrossLayer
from mapreuse.techniques._fixed import Diagonal, Gaussian
from mapreuse.techniques._full import Full
from mapreuse.techniques._grouped import Grouped
from mapreuse.techniques._grouped_query import GroupedQuery
from mapreuse.techniques._heads import Heads
from mapreuse.techniques._layers import Layers
from mapreuse.techniques._linear import Linear
from mapreuse.techniques._linformer import Linformer
from mapreuse.techniques._nystrom import Nystrom
from mapreuse.techniques._performer import Performer
from mapreuse.techniques._pooled import Pooled
from mapreuse.techniques._prob_sparse import ProbSparse
from mapreuse.techniques._query_key_dim import QueryKeyDim
from mapreuse.techniques._reuse import Reuse
from mapreuse.techniques._skipped import Skipped
from mapreuse.techniques._strided import Strided
from mapreuse.techniques._study import study_techniques
from mapreuse.techniques._technique import TECHNIQUES, Technique, parse
from mapreuse.techniques._window import Window

__all__ = [
    "TECHNIQUES",
    "CrossLayer",
    "Diagonal",
    "Full",
    "Gaussian",
    "Grouped",
    "GroupedQuery",
    "Heads",
    "Layers",
    "Linear",
    "Linformer",
    "Nystrom",
    "Performer",
    "Pooled",
    "ProbSparse",
    "QueryKeyDim",
    "Reuse",
    "Skipped",
    "Strided",
    "Technique",
    "Window",
    "parse",
    "study_techniques",
]
