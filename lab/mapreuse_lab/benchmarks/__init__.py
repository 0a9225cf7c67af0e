"""Benchmarks of encoders with random weights, and of single attention kernels."""

from mapreuse_lab.benchmarks._breakdown import LENGTHS, breakdown_by_length
from mapreuse_lab.benchmarks._breakdown_page import write_breakdown_page
from mapreuse_lab.benchmarks._encoder_bench import bench_encoder, open_encoder
from mapreuse_lab.benchmarks._gpu import run_gpu
from mapreuse_lab.benchmarks._kernels import bench_kernels, kernel_tables

__all__ = [
    "LENGTHS",
    "bench_encoder",
    "bench_kernels",
    "breakdown_by_length",
    "kernel_tables",
    "open_encoder",
    "run_gpu",
    "write_breakdown_page",
]
