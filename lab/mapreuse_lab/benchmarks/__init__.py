"""Benchmarks of encoders with random weights, and of single attention kernels."""

from mapreuse_lab.benchmarks._encoder_bench import bench_encoder, open_encoder
from mapreuse_lab.benchmarks._kernels import bench_kernels, kernel_tables

__all__ = [
    "bench_encoder",
    "bench_kernels",
    "kernel_tables",
    "open_encoder",
]
