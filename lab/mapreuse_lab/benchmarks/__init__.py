"""Benchmarks of encoders with random weights, and of single attention kernels."""

from mapreuse_lab.benchmarks._encoder_bench import ENCODERS, bench_encoder, encoder_memory, open_encoder
from mapreuse_lab.benchmarks._kernels import bench_kernels, kernel_tables

__all__ = [
    "ENCODERS",
    "bench_encoder",
    "bench_kernels",
    "encoder_memory",
    "kernel_tables",
    "open_encoder",
]
