"""Where does attention live in a model family, and how is it made to share maps?"""

from mapreuse.models import _falcon, _fused, _moonshine, _relative, _timm, _torch_encoder, _wavlm  # noqa: F401  register adapters
from mapreuse.models._apply import apply, plan_of, with_projections
from mapreuse.models._cache import CachedStates, cache_of_states, states_of_cache
from mapreuse.models._cache_bytes import CacheBytes, cache_bytes, keeps_cache
from mapreuse.models._drop_layers import drop_layers
from mapreuse.models._files import load, save, transformer_directory
from mapreuse.models._layout import LayerLayout, keeping_maps, layout_of
from mapreuse.models._moonshine import with_integer_lengths
from mapreuse.models._optimize import optimize, optimized
from mapreuse.models._plan_conversions import possible_sources
from mapreuse.models._projections import output_projection, value_projection
from mapreuse.models._recording import MapRecorder, Recording, check_batch, not_padding, recorded_states
from mapreuse.models._runtime import MAPS_ARGUMENT, inputs_of, observing_inputs, published_scores
from mapreuse.models._snapshots import copy_with_same_weights
from mapreuse.models._source import Unsupported
from mapreuse.models._stack import Layer, check_model, find_stack

__all__ = [
    "MAPS_ARGUMENT",
    "CacheBytes",
    "CachedStates",
    "Layer",
    "LayerLayout",
    "MapRecorder",
    "Recording",
    "Unsupported",
    "apply",
    "cache_bytes",
    "cache_of_states",
    "check_batch",
    "check_model",
    "copy_with_same_weights",
    "drop_layers",
    "find_stack",
    "inputs_of",
    "keeping_maps",
    "keeps_cache",
    "layout_of",
    "load",
    "not_padding",
    "observing_inputs",
    "optimize",
    "optimized",
    "output_projection",
    "plan_of",
    "possible_sources",
    "published_scores",
    "recorded_states",
    "save",
    "states_of_cache",
    "transformer_directory",
    "value_projection",
    "with_integer_lengths",
    "with_projections",
]
