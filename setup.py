"""Maps `kernels/` to `fastlm.kernels`, and builds the CUDA C++ kernels where they are wanted;
everything static is in pyproject.toml.

The list is explicit because setuptools' discovery does not see remapped packages
(https://github.com/pypa/setuptools/issues/4248).
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SUBPACKAGES = ["bench", "cli", "layers", "models", "ops", "reference", "swap", "training"]


def load_builder():
    """csrc/build.py, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("fastlm_build", ROOT / "csrc" / "build.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load_builder()
try:
    tools = builder.wanted()
except builder.BuildError as error:
    sys.exit(f"fastlm: {error}")


class BuildCuda(build_ext):
    """Builds `_C` and, beside it, the library of operators."""

    def build_extension(self, ext):
        folder = Path(self.get_ext_fullpath(ext.name)).parent
        if self.editable_mode:
            folder = ROOT / "fastlm"
        try:
            builder.build(folder, tools, strict=False)
        except builder.BuildError as error:
            if os.environ.get(builder.VARIABLE) == "1":
                sys.exit(f"fastlm: {error}")
            print(builder.without(error))

    def copy_extensions_to_source(self):
        pass  # they were built there


setup(
    packages=["fastlm", *(f"fastlm.{name}" for name in SUBPACKAGES), "fastlm.kernels"],
    package_dir={"fastlm.kernels": "kernels"},
    package_data={"fastlm": ["py.typed"]},
    ext_modules=[Extension("fastlm._C", ["csrc/bindings/module.cpp"])] if tools else [],
    cmdclass={"build_ext": BuildCuda},
    # What only a build of the kernels needs; asked for before the isolated environment is made.
    setup_requires=builder.REQUIREMENTS if tools else [],
)
