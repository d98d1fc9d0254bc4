"""csrc/sass.py finds the inner loops of a kernel in its disassembly and counts what they issue."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.simt import harness

sys.path.insert(0, str(harness.ROOT / "csrc"))
import sass  # noqa: E402

import build  # noqa: E402

sys.path.pop(0)

LISTING = """
	code for sm_90a
		Function : _ZN5cobra6kernelEv
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000fe20000000800 */
        /*0010*/                   MOV R2, RZ ;                              /* 0x0 */
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ; /* 0x0 */
        /*0030*/                   MUFU.EX2 R5, R4 ;                         /* 0x0 */
        /*0040*/              @!P0 FFMA R6, R5, R4, R6 ;                     /* 0x0 */
        /*0050*/              @P1  BRA 0x30 ;                                /* 0x0 */
        /*0060*/                   STG.E.U16 desc[UR4][R2.64], R6 ;          /* 0x0 */
        /*0070*/              @P2  BRA 0x10 ;                                /* 0x0 */
        /*0080*/                   EXIT ;                                    /* 0x0 */
        /*0090*/                   BRA 0x90;                                 /* 0x0 */
        /*00a0*/                   NOP;                                      /* 0x0 */
"""

needs_tools = pytest.mark.skipif(
    build.find_nvcc() is None or sass.tools() is None, reason="nvcc, or cuobjdump and nvdisasm, not found"
)


def test_innermost_loops_of_a_listing():
    ((name, instructions),) = sass.functions(LISTING)
    assert name == "_ZN5cobra6kernelEv" and len(instructions) == 11
    assert sass.loops(instructions) == [(0x30, 0x50)]  # neither the loop around it nor the branch to itself
    (inner,) = sass.counts(instructions)
    assert inner.issued == 3 and inner.slots == {"MUFU": 1, "FP32": 1, "branch": 1}
    whole = sass.count(instructions, "all")
    assert whole.issued == 10 and whole.bytes == {"LDG": 16, "STG": 2}  # NOP is padding
    assert "1.5 issue slots" in "\n".join(sass.report("kernel", [inner], 2))


def test_two_branches_to_one_head_are_one_loop():
    assert sass.loops([(0, "MOV R1, R2"), (16, "@P0 BRA 0x0"), (32, "IADD3 R1, R1, 1"), (48, "@P1 BRA 0x0")]) == [(0, 48)]


@pytest.mark.parametrize(
    "opcode, size", [("LDG.E", 4), ("LDG.E.64", 8), ("LDS.128", 16), ("LDG.E.U16.CONSTANT", 2), ("LDGSTS.E.BYPASS.128", 16), ("LDSM.16.M88.4", 16), ("STG.E.U8", 1)]
)
def test_access_widths(opcode, size):
    assert sass.access_bytes(opcode) == size


KERNEL = """
__global__ void known(const float4* x, float* y, int n) {
  float sum = 0.f;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 32) {
    float4 v = x[i], e;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(e.x) : "f"(v.x));
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(e.y) : "f"(v.y));
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(e.z) : "f"(v.z));
    sum = e.x * e.y + sum;
    sum = e.z * v.w + sum;
  }
  y[threadIdx.x] = sum;
}
"""


@needs_tools
@pytest.mark.parametrize("arch", ["80", "90a", "120"])
def test_a_loop_of_known_work(arch, tmp_path):
    source, cubin = tmp_path / "known.cu", tmp_path / "known.cubin"
    source.write_text(KERNEL)
    command = [build.find_nvcc(), "-O3", "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", str(source), "-o", str(cubin)]
    subprocess.run(command, check=True)
    ((_, instructions),) = sass.functions(sass.disassemble(cubin, sass.tools()))
    (inner,) = sass.counts(instructions)
    assert inner.slots["MUFU"] == 3 and inner.slots["FP32"] == 2 and inner.slots["branch"] == 1 and inner.slots["other"] == 0
    assert inner.bytes == {"LDG": 16} and inner.issued <= 14


@needs_tools
def test_rms_norm_from_its_source(capsys):
    assert sass.main(["rms_norm_fwd_vector_kernel<__nv_bfloat16, 8>"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("rms_norm_fwd_vector_kernel<__nv_bfloat16, 8>  sm_90a") == 1
    assert "LDS 16  FP32 16" in printed  # the sum over a block's warps, unrolled by 16
    assert "local" not in printed and "other" not in printed
    assert sass.main(["no_such_kernel"]) == 1
