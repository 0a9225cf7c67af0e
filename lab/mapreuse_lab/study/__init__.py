"""Which runs make the study, and what does its report show?"""

from mapreuse_lab.study._config import FullConfig
from mapreuse_lab.study._full import run_full
from mapreuse_lab.study._papers import papers_page
from mapreuse_lab.study._pretrained_page import write_technique_page
from mapreuse_lab.study._pretrained_techniques import TechniqueStudy
from mapreuse_lab.study._quick import QuickConfig, run_quick
from mapreuse_lab.study._report import read_results, report, summary_tables, write_report
from mapreuse_lab.study._runs import Recipe, Run, RunDirectory
from mapreuse_lab.study._statistics import significance
from mapreuse_lab.study._verdict import verdict

__all__ = [
    "FullConfig",
    "QuickConfig",
    "Recipe",
    "Run",
    "RunDirectory",
    "TechniqueStudy",
    "papers_page",
    "read_results",
    "report",
    "run_full",
    "run_quick",
    "significance",
    "summary_tables",
    "verdict",
    "write_report",
    "write_technique_page",
]
