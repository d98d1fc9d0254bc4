"""nvcc-check reads every figure that ptxas prints, refuses spills and silence, and compares with the committed table."""

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
    text = re.sub(r"__launch_bounds__\(.*\)$", "__launch_bounds__(1024, 2)", source.read_text(), count=1, flags=re.MULTILINE)
    copy = tmp_path / source.name
    copy.write_text(text)
    command = [nvcc, *build.NVCC_FLAGS, "-cubin", "-arch=sm_80", "-Xptxas", "-v", f"-I{build.CSRC}", "-c", str(copy), "-o", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kernels = build.read_ptxas_log(done.stdout + done.stderr)
    assert any(figures["spills"] for figures in kernels.values())


def figures(registers=64, shared=128, stack=0, spills=0):
    return {"registers": registers, "shared": shared, "stack": stack, "spills": spills}


KERNEL = ("room/room_cuda.cu", "kernel<float>")


def compare(now, committed, same_compiler=True):
    return build.compare_figures({KERNEL: {"80": now}}, {KERNEL: {"80": committed}}, ["80"], same_compiler)


def test_figures_as_committed_pass():
    assert compare(figures(), figures()) == ([], [])


@pytest.mark.parametrize("what", ["registers", "shared", "stack"])
def test_a_regression_fails_and_a_gain_is_remarked(what):
    more, less = figures(**{what: 256}), figures(**{what: 255})
    failures, remarks = compare(more, less)
    assert failures == [f"room/room_cuda.cu: kernel<float> (sm_80): {what} 255 -> 256"] and not remarks
    failures, remarks = compare(less, more)
    assert not failures and "fewer than in the table" in remarks[0]
    assert compare(more, less, same_compiler=False) == ([], [f"room/room_cuda.cu: kernel<float> (sm_80): {what} 255 -> 256"])


def test_a_spill_fails_under_any_compiler():
    assert compare(figures(spills=8), figures(), same_compiler=False)[0] == ["room/room_cuda.cu: kernel<float> spills 8 bytes (sm_80)"]


def test_kernels_and_table_must_be_the_same_set():
    now = {KERNEL: {"80": figures(), "90a": figures()}}
    assert "is not in the table" in build.compare_figures(now, {}, ["80"])[0][0]
    assert "no longer in the source" in build.compare_figures({}, now, ["80"])[0][0]
    assert "not in the table for sm_90a" in build.compare_figures(now, {KERNEL: {"80": figures()}}, ["80", "90a"])[0][0]
    assert "only in the table for sm_90a" in build.compare_figures({KERNEL: {"80": figures()}}, now, ["80", "90a"])[0][0]
    assert build.compare_figures({KERNEL: {"80": figures()}}, now, ["80"]) == ([], [])  # an image that was not asked for


def test_the_table_comes_back_as_it_was_written(tmp_path):
    everywhere = {arch: {"registers": 60 + i, "shared": 16 * i, "stack": 0} for i, arch in enumerate(build.ALL_ARCHS)}
    written = {KERNEL: everywhere, (KERNEL[0], "hopper_kernel<4, true>"): {"90a": everywhere["90a"]}}
    build.write_table(written, "13.0.88", tmp_path / "table.tsv")
    assert build.read_table(tmp_path / "table.tsv") == ("13.0.88", written)
    assert build.read_table(tmp_path / "absent.tsv") == ("", {})


@pytest.mark.parametrize("environment, message", [({"ARCHS": "80 70"}, "expected some of"), ({"ARCHS": "80", "UPDATE": "1"}, "all of them with UPDATE"), ({"ROOM": "nowhere"}, "has no .cu")])
def test_architectures_are_checked(environment, message, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(build.BuildError, match=message):
        build.nvcc_check()


def test_one_room_is_compared_and_updated_alone(tmp_path, monkeypatch):
    everywhere = {arch: figures() for arch in build.ALL_ARCHS}
    more = {arch: figures(registers=80) for arch in build.ALL_ARCHS}
    other = ("other/other_cuda.cu", "kernel")
    monkeypatch.setattr(build, "TABLE", build.ROOT / "build" / f"{tmp_path.name}.tsv")
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build, "nvcc_version", lambda nvcc: "13.0.88")
    monkeypatch.setattr(build, "measure_kernels", lambda nvcc, archs, room: {("rms_norm/x.cu", "kernel"): more})
    monkeypatch.setenv("ROOM", "rms_norm")
    build.TABLE.parent.mkdir(exist_ok=True)
    try:
        build.write_table({other: everywhere, ("rms_norm/x.cu", "kernel"): everywhere}, "13.0.88", build.TABLE)
        with pytest.raises(build.BuildError, match="registers 64 -> 80"):
            build.nvcc_check()
        monkeypatch.setenv("UPDATE", "1")
        build.nvcc_check()
        monkeypatch.delenv("UPDATE")
        assert "1 kernels" in build.nvcc_check()
        assert build.read_table(build.TABLE)[1].keys() == {other, ("rms_norm/x.cu", "kernel")}
    finally:
        build.TABLE.unlink()
