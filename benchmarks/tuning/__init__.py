"""What `benchmarks/tune.py` sweeps by itself, one launcher's configurations after the other."""
