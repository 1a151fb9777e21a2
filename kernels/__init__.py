"""Triton kernels and their launchers, installed as `fastlm.kernels`. Imports no triton."""
