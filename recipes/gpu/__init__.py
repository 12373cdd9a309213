"""The rows of recipes/bench_gpu.py: what is built and measured at true size, a file for each kind."""
