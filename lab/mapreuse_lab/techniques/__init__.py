"""What else could compress this attention? The contestants of the comparison, reuse among them."""

from mapreuse_lab.techniques._cross_layer import CrossLayer
from mapreuse_lab.techniques._fixed import Diagonal, Gaussian
from mapreuse_lab.techniques._full import Full
from mapreuse_lab.techniques._grouped import Grouped
from mapreuse_lab.techniques._grouped_query import GroupedQuery
from mapreuse_lab.techniques._heads import Heads
from mapreuse_lab.techniques._layers import Layers
from mapreuse_lab.techniques._linear import Linear
from mapreuse_lab.techniques._linformer import Linformer
from mapreuse_lab.techniques._nystrom import Nystrom
from mapreuse_lab.techniques._performer import Performer
from mapreuse_lab.techniques._pooled import Pooled
from mapreuse_lab.techniques._prob_sparse import ProbSparse
from mapreuse_lab.techniques._query_key_dim import QueryKeyDim
from mapreuse_lab.techniques._reuse import Reuse
from mapreuse_lab.techniques._skipped import Skipped
from mapreuse_lab.techniques._strided import Strided
from mapreuse_lab.techniques._study import study_techniques
from mapreuse_lab.techniques._technique import TECHNIQUES, Technique, parse
from mapreuse_lab.techniques._window import Window

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
