"""Every operator in eager PyTorch: readable, fp64-clean, the specification of all backends."""
