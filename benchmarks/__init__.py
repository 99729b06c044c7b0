"""deqcore beside torchdeq: `python -m benchmarks` measures, prints tables and writes them to benchmarks/results/."""
