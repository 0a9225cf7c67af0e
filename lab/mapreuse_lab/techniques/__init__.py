"""Ways to compress self-attention; attention map reuse is one of them.

Each file has formula, cost and paper on top, then the attention module, then the technique with its settings. `parse`
makes a technique from its name, and `apply` changes a model:

    parse("window-16").apply(model)                               a Parakeet encoder, to be trained from scratch
    parse("window-16").convert_pretrained(model, batches)         a pretrained encoder or decoder

`Technique` describes how to add one.
"""

from mapreuse_lab.techniques._attention_output import MappedOutputs
from mapreuse_lab.techniques._cross_layer import CrossLayer
from mapreuse_lab.techniques._fixed import Diagonal, Gaussian
from mapreuse_lab.techniques._grouped import Grouped
from mapreuse_lab.techniques._grouped_query import GroupedQuery
from mapreuse_lab.techniques._heads import Heads, WideHeads
from mapreuse_lab.techniques._int8 import Int8
from mapreuse_lab.techniques._linear import Linear
from mapreuse_lab.techniques._linformer import Linformer
from mapreuse_lab.techniques._low_rank import LowRank
from mapreuse_lab.techniques._notation import layer_sources
from mapreuse_lab.techniques._nystrom import Nystrom
from mapreuse_lab.techniques._performer import Performer
from mapreuse_lab.techniques._pooled import Pooled
from mapreuse_lab.techniques._pretrained import PretrainedStack
from mapreuse_lab.techniques._pretrained_techniques import pretrained_techniques
from mapreuse_lab.techniques._prob_sparse import ProbSparse
from mapreuse_lab.techniques._query_key_dim import QueryKeyDim
from mapreuse_lab.techniques._reuse import CorrectedMaps, Full, Reuse, SharedKeys
from mapreuse_lab.techniques._strided import Strided
from mapreuse_lab.techniques._study_techniques import study_techniques
from mapreuse_lab.techniques._technique import Technique, parse
from mapreuse_lab.techniques._token_merging import TokenMerging
from mapreuse_lab.techniques._upper_layers import Layers, Skipped
from mapreuse_lab.techniques._window import Window

__all__ = [
    "CorrectedMaps",
    "CrossLayer",
    "Diagonal",
    "Full",
    "Gaussian",
    "Grouped",
    "GroupedQuery",
    "Heads",
    "Int8",
    "Layers",
    "Linear",
    "Linformer",
    "LowRank",
    "MappedOutputs",
    "Nystrom",
    "Performer",
    "Pooled",
    "PretrainedStack",
    "ProbSparse",
    "QueryKeyDim",
    "Reuse",
    "SharedKeys",
    "Skipped",
    "Strided",
    "Technique",
    "TokenMerging",
    "WideHeads",
    "Window",
    "layer_sources",
    "parse",
    "pretrained_techniques",
    "study_techniques",
]
