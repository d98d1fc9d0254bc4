"""nvcc-check reads every figure that ptxas prints, and refuses spills and silence."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.simt import harness

sys.path.insert(0, str(harness.ROOT / "csrc"))
import build  # noqa: E402

sys.path.pop(0)

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5cobra6kernelIfEEvNS_6ParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN5cobra6kernelIfEEvNS_6ParamsE
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 63 registers, used 1 barriers, 128 bytes smem, 16 bytes cumulative stack size
ptxas info    : Compiling entry function '_ZN5cobra5emptyEv' for 'sm_90a'
ptxas info    : Function properties for _ZN5cobra5emptyEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 4 registers, used 0 barriers
"""


def test_figures_are_read():
    assert build.read_ptxas_log(LOG) == {
        "_ZN5cobra6kernelIfEEvNS_6ParamsE": {"registers": 63, "shared": 128, "stack": 16, "spills": 12},
        "_ZN5cobra5emptyEv": {"registers": 4, "shared": 0, "stack": 0, "spills": 0},
    }
    for missing in (r"    16 bytes stack.*\n", r"ptxas info    : Used 63.*\n"):
        with pytest.raises(build.BuildError, match="printed no figures for _ZN5cobra6kernel"):
            build.read_ptxas_log(re.sub(missing, "", LOG))


def test_a_spill_is_seen(tmp_path):
    """The forward kernels with room for 32 registers must spill."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc not found")
    source = build.CSRC / "rms_norm" / "rms_norm_cuda_fwd.cu"
    text = re.sub(r"__launch_bounds__\([^)]*\)[^)]*\)", "__launch_bounds__(1024, 2)", source.read_text(), count=1)
    copy = tmp_path / source.name
    copy.write_text(text)
    command = [nvcc, *build.NVCC_FLAGS, "-cubin", "-arch=sm_80", "-Xptxas", "-v", f"-I{build.CSRC}", "-c", str(copy), "-o", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kernels = build.read_ptxas_log(done.stdout + done.stderr)
    assert any(figures["spills"] for figures in kernels.values())
