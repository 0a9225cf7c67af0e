"""What does it cost, how alike are maps?"""

from mapreuse.measure._analysis import Analysis, analyze
from mapreuse.measure._analysis_report import analysis_tables, write_analysis
from mapreuse.measure._bench import bench
from mapreuse.measure._breakdown import (
    Breakdown,
    BreakdownConfig,
    LayerBreakdown,
    PartCost,
    breakdown,
    encoders_to_compare,
)
from mapreuse.measure._breakdown_report import breakdown_data, breakdown_plot, breakdown_tables
from mapreuse.measure._concentration import Concentration, concentration
from mapreuse.measure._config import BenchConfig, plans_for
from mapreuse.measure._cores import KernelsConfig, bench_kernels
from mapreuse.measure._diagonality import Diagonality, diagonality
from mapreuse.measure._encoders import ENCODERS, SUBSAMPLING, conformer_m
from mapreuse.measure._entropy import Entropy, entropy
from mapreuse.measure._flops import PARTS
from mapreuse.measure._latency import Latency, time_interleaved
from mapreuse.measure._machine import machine
from mapreuse.measure._memory import memory_in_fresh_process, peak_memory
from mapreuse.measure._over_queries import maps_by_sequence
from mapreuse.measure._page import Image, Section, write_page
from mapreuse.measure._similarity import Similarity, similarity
from mapreuse.measure._tables import bench_tables, kernel_tables

__all__ = [
    "ENCODERS",
    "PARTS",
    "SUBSAMPLING",
    "Analysis",
    "BenchConfig",
    "Breakdown",
    "BreakdownConfig",
    "Concentration",
    "Diagonality",
    "Entropy",
    "Image",
    "KernelsConfig",
    "Latency",
    "LayerBreakdown",
    "PartCost",
    "Section",
    "Similarity",
    "analysis_tables",
    "analyze",
    "bench",
    "bench_kernels",
    "bench_tables",
    "breakdown",
    "breakdown_data",
    "breakdown_plot",
    "breakdown_tables",
    "concentration",
    "conformer_m",
    "diagonality",
    "encoders_to_compare",
    "entropy",
    "kernel_tables",
    "machine",
    "maps_by_sequence",
    "memory_in_fresh_process",
    "peak_memory",
    "plans_for",
    "similarity",
    "time_interleaved",
    "write_analysis",
    "write_page",
]
