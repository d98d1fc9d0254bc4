"""python -m cobra_kernels.compat SCRIPT ARGS | -m MODULE ARGS: runs it with mamba_ssm and causal_conv1d served by cobra_kernels."""

from __future__ import annotations

import runpy
import sys

from .install import install


def main(arguments: list[str]) -> int:
    force = arguments[:1] == ["--force"]
    rest = arguments[1:] if force else arguments
    is_module = rest[:1] == ["-m"]
    rest = rest[1:] if is_module else rest
    if not rest or rest[0] in ("-h", "--help"):
        print(__doc__ + "\n  --force  in place of really installed packages too", file=sys.stderr)
        return 0 if rest else 2
    for package, what in install(force).items():
        print(f"cobra_kernels.compat: {package} is {what}", file=sys.stderr)
    sys.argv = rest
    if is_module:
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(__import__("pathlib").Path(rest[0]).resolve().parent)
        runpy.run_path(rest[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
