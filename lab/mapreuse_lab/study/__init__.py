"""Which runs make the study, and how are they shown?"""

from mapreuse_lab.study._compare import Errors
from mapreuse_lab.study._config import FullConfig
from mapreuse_lab.study._full import run_full
from mapreuse_lab.study._markdown import markdown
from mapreuse_lab.study._page import page
from mapreuse_lab.study._papers import papers_page
from mapreuse_lab.study._quick import QuickConfig, run_quick
from mapreuse_lab.study._report import error_table, latency_table, page_results, report
from mapreuse_lab.study._runs import LongRecipe, Recipe
from mapreuse_lab.study._verdict import summary_table, verdict

__all__ = [
    "Errors",
    "FullConfig",
    "LongRecipe",
    "QuickConfig",
    "Recipe",
    "error_table",
    "latency_table",
    "markdown",
    "page",
    "page_results",
    "papers_page",
    "report",
    "run_full",
    "run_quick",
    "summary_table",
    "verdict",
]
