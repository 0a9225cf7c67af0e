"""How do models and calibration data get from disk into batches?"""

from mapreuse.data._batches import batches_by_length, check_enough, open_batches
from mapreuse.data._files import sound_files
from mapreuse.data._models import OpenedModel, check_precision, open_model

__all__ = [
    "OpenedModel",
    "batches_by_length",
    "check_enough",
    "check_precision",
    "open_batches",
    "open_model",
    "sound_files",
]
