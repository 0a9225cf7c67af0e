"""Which runs make the study, and how are they shown?"""

from mapreuse.study._quick import QuickConfig, run_quick
from mapreuse.study._report import error_table, latency_table

__all__ = ["QuickConfig", "error_table", "latency_table", "run_quick"]
