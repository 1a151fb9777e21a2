"""Triton kernels and their launchers, installed as `fastlm.kernels`. Importing this package imports no triton."""
