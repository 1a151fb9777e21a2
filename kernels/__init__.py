"""Triton kernels and their launchers, installed as `fastlm.kernels`. This file imports no triton."""
