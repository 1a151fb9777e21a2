"""The public functions: check, choose a backend, run an autograd.Function over registered contracts."""

from fastlm.ops.norm import layer_norm, rms_norm

__all__ = [
    "layer_norm",
    "rms_norm",
]
