"""The public functions: check, choose a backend, run an autograd.Function over registered contracts."""

__all__ = []
