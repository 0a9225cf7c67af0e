"""How does a trained model become one that reuses maps, and stays good?"""

from mapreuse.convert._align import align, align_by, group_by
from mapreuse.convert._convert import convert

__all__ = ["align", "align_by", "convert", "group_by"]
