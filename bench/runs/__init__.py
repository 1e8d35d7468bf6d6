"""The experiments behind results/: python -m bench.runs.NAME."""
