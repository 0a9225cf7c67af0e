"""What should I use for this model, on this machine, without training?"""

from mapreuse.advising._advice import METRICS, Advice, MeasuredOption, Option
from mapreuse.advising._advise import MIN_ADVICE_BATCHES, advise

__all__ = [
    "METRICS",
    "MIN_ADVICE_BATCHES",
    "Advice",
    "MeasuredOption",
    "Option",
    "advise",
]
