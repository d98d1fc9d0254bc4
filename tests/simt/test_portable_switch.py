"""The emulator on processors other than x86-64, which switches fibers with ucontext: built and run here by asking for it."""

from __future__ import annotations

import subprocess
import sys

from tests.simt import harness, room_rms_norm, test_simt

sys.path.insert(0, str(harness.ROOT / "csrc"))
import build  # noqa: E402

sys.path.pop(0)


def test_ucontext_switch(built_host, tmp_path):
    cxx = build.find_cxx()
    objects = []
    for source in [*sorted((build.CSRC / "rms_norm").glob("*_cuda*.cu")), build.CSRC / "simt" / "probe.cu"]:
        objects.append(tmp_path / f"{source.name}.o")
        command = [cxx, "-DSIMT_UCONTEXT", *build.emulated_flags("host"), "-O0", "-c", str(source), "-o", str(objects[-1])]
        subprocess.run(command, check=True)
    # A module of one room is whole: each host file registers itself.
    objects += [path for path in build.host_glue_objects(cxx) if path.name.startswith(("module.", "probe_", "rms_norm_"))]
    module = tmp_path / build.host_module("host").name
    subprocess.run([cxx, "-shared", "-o", str(module), *map(str, [*objects, *build.host_cpu_objects(cxx, "host")]), "-lpthread"], check=True)
    host = harness.load_module(module)
    for order, seed in test_simt.ORDERS[:3]:
        test_simt.test_warp_collectives(host, order, seed)
        test_simt.test_blocks_hand_over_by_ticket_with_any_number_resident(host, order, seed, 3)
    for what, message in test_simt.BROKEN_RULES:
        test_simt.test_a_broken_rule_is_an_exception(host, "forward", 1, what, message)
    host.set_simt(order="random")
    room_rms_norm.check(host, room_rms_norm.Case(shape=(2, 2560)), "cuda")
