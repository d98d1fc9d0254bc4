"""Hooks csrc/build.py, which knows every source and flag, into setuptools. Run with --no-build-isolation, torch installed."""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("cobra_kernels_build", ROOT / "csrc" / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


class BuildKernels(build_ext):
    """One shared object without PyInit, loaded by torch.ops.load_library: it serves every Python and every torch >= 2.11."""

    def output(self) -> Path:
        """Where the shared object goes: the tree for an editable install, the build folder for a wheel."""
        return build.EXTENSION if self.inplace or self.editable_mode else Path(self.build_lib).resolve() / "cobra_kernels" / build.EXTENSION.name

    def run(self) -> None:
        """Builds; without a compiler the package is still installed, runs on `reference` and `triton`, and says so."""
        try:
            message = build.build_extension(self.output())
        except build.NoCompiler as error:
            if os.environ.get("COBRA_KERNELS_BUILD_CUDA") == "1":
                raise
            message = f"cobra_kernels: compiled kernels left out: {error}"
        print(message)

    def get_outputs(self) -> list[str]:
        """Files to install: none when nothing could be compiled."""
        return [str(self.output())] if self.output().exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        """An editable install builds in place: nothing is copied."""
        return {}


setup(
    ext_modules=[Extension("cobra_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
