"""Maps `kernels/` to `fastlm.kernels`; everything static is in pyproject.toml.

The list is explicit because setuptools' discovery does not see remapped packages
(https://github.com/pypa/setuptools/issues/4248).
"""

from setuptools import setup

SUBPACKAGES = ["bench", "cli", "layers", "models", "ops", "reference", "swap", "training"]

setup(
    packages=["fastlm", *(f"fastlm.{name}" for name in SUBPACKAGES), "fastlm.kernels"],
    package_dir={"fastlm.kernels": "kernels"},
    package_data={"fastlm": ["py.typed"]},
)
