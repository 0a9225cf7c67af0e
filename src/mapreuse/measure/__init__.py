"""What does it cost, how alike are maps?"""

from mapreuse.measure._bench import bench
from mapreuse.measure._config import BenchConfig, plans_for
from mapreuse.measure._cores import CoresConfig, bench_cores
from mapreuse.measure._encoders import ENCODERS, SUBSAMPLING, conformer_m
from mapreuse.measure._latency import Latency, time_interleaved
from mapreuse.measure._machine import machine
from mapreuse.measure._similarity import Similarity, similarity
from mapreuse.measure._tables import Table, bench_tables, cores_tables

__all__ = [
    "ENCODERS",
    "SUBSAMPLING",
    "BenchConfig",
    "CoresConfig",
    "Latency",
    "Similarity",
    "Table",
    "bench",
    "bench_cores",
    "bench_tables",
    "conformer_m",
    "cores_tables",
    "machine",
    "plans_for",
    "similarity",
    "time_interleaved",
]
