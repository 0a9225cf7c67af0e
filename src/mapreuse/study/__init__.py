"""Which runs make the study, and how are they shown?"""

from mapreuse.study._compare import Errors
from mapreuse.study._config import FullConfig
from mapreuse.study._full import run_full
from mapreuse.study._markdown import markdown
from mapreuse.study._page import page
from mapreuse.study._papers import papers_page
from mapreuse.study._quick import QuickConfig, run_quick
from mapreuse.study._report import error_table, latency_table, page_results, report
from mapreuse.study._runs import LongRecipe, Recipe
from mapreuse.study._verdict import summary_table, verdict

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
