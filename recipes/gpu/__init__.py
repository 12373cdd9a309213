"""The rows of recipes/bench_gpu.py: true-size models and how they are measured."""
