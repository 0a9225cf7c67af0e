"""How do models and calibration data get from disk into batches?"""

from mapreuse.data._audio import as_waveform, check_sampling_rate, open_sound, resample
from mapreuse.data._batches import batches_by_length, check_enough, open_batches
from mapreuse.data._files import sound_files
from mapreuse.data._lengths import batches_by_quantile, batches_of_lengths, with_batch_size
from mapreuse.data._models import OpenedModel, check_precision, open_model

__all__ = [
    "OpenedModel",
    "as_waveform",
    "batches_by_length",
    "batches_by_quantile",
    "batches_of_lengths",
    "check_enough",
    "check_precision",
    "check_sampling_rate",
    "open_batches",
    "open_model",
    "open_sound",
    "resample",
    "sound_files",
    "with_batch_size",
]
