"""What does a model cost, and how similar are its attention maps?"""

from mapreuse.measure._analysis import Analysis, Similarity, analyze, maps_by_sequence
from mapreuse.measure._analysis_report import analysis_tables, write_analysis
from mapreuse.measure._attribution import part_of_modules
from mapreuse.measure._bench import bench, contestant_memory, disagreement
from mapreuse.measure._bench_plot import plot_bench
from mapreuse.measure._breakdown import PARTS, breakdown
from mapreuse.measure._contestants import ALL_KINDS, Contestant, use_attention
from mapreuse.measure._flops import flop_counter
from mapreuse.measure._latency import Latency, cpu_threads, fastest_threads, time_interleaved
from mapreuse.measure._machine import machine
from mapreuse.measure._memory import memory_in_fresh_process, peak_memory
from mapreuse.measure._page import Image, Section, write_page
from mapreuse.measure._tables import bench_tables, breakdown_tables, latency_text, ratio_text

__all__ = [
    "ALL_KINDS",
    "PARTS",
    "Analysis",
    "Contestant",
    "Image",
    "Latency",
    "Section",
    "Similarity",
    "analysis_tables",
    "analyze",
    "bench",
    "bench_tables",
    "breakdown",
    "breakdown_tables",
    "contestant_memory",
    "cpu_threads",
    "disagreement",
    "fastest_threads",
    "flop_counter",
    "latency_text",
    "machine",
    "maps_by_sequence",
    "memory_in_fresh_process",
    "part_of_modules",
    "peak_memory",
    "plot_bench",
    "ratio_text",
    "time_interleaved",
    "use_attention",
    "write_analysis",
    "write_page",
]
