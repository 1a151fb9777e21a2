"""Fused, differentiable kernels for the whole Transformer. See README.md and DESIGN.md.

Importing fastlm imports torch alone: triton is loaded by the first call that runs a Triton kernel.
"""

from fastlm import ops
from fastlm._version import __version__
from fastlm.backends import explain
from fastlm.ops import *  # noqa: F403

__all__ = ["__version__", "explain", *ops.__all__]
