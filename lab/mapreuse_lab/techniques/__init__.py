"""Ways to compress the self-attention of a Parakeet encoder; attention map reuse is one of them.

Each file has formula, cost and paper on top, then the attention module, then the technique with its settings. `parse`
makes a technique from its name, and `apply` changes a model:

    parse("window-16").apply(model)

`Technique` describes how to add one.
"""

from mapreuse_lab.techniques._cross_layer import CrossLayer
from mapreuse_lab.techniques._fixed import Diagonal, Gaussian
from mapreuse_lab.techniques._grouped import Grouped
from mapreuse_lab.techniques._grouped_query import GroupedQuery
from mapreuse_lab.techniques._heads import Heads, WideHeads
from mapreuse_lab.techniques._linear import Linear
from mapreuse_lab.techniques._linformer import Linformer
from mapreuse_lab.techniques._notation import layer_sources
from mapreuse_lab.techniques._nystrom import Nystrom
from mapreuse_lab.techniques._performer import Performer
from mapreuse_lab.techniques._pooled import Pooled
from mapreuse_lab.techniques._prob_sparse import ProbSparse
from mapreuse_lab.techniques._query_key_dim import QueryKeyDim
from mapreuse_lab.techniques._reuse import Full, Reuse
from mapreuse_lab.techniques._strided import Strided
from mapreuse_lab.techniques._study_techniques import study_techniques
from mapreuse_lab.techniques._technique import Technique, parse
from mapreuse_lab.techniques._upper_layers import Layers, Skipped
from mapreuse_lab.techniques._window import Window

__all__ = [
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
    "WideHeads",
    "Window",
    "layer_sources",
    "parse",
    "study_techniques",
]
