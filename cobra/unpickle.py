"""The one place where a pickle is opened: a program of its own, locked down before it looks at the file.

    python -I -B unpickle.py LIBRARIES FILE            started by source.py; LIBRARIES is the folder that holds torch

It reads FILE by `torch.load(weights_only=True, mmap=True)` and in no other way. One line of JSON on stdout lists the tensors; then,
for every line with an index on stdin, the bytes of that tensor follow. Whatever the file makes of the process, the process can read
files and write to its pipes and nothing else: no network, no new process, no file opened for writing, no new machine code, bounded
memory and time. That is a filter of system calls (seccomp, Linux 4.14 or later, x86-64 or arm64); without one nothing is read.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import mmap
import os
import platform
import resource
import struct
import sys

MAX_TENSORS = 20_000
MAX_DEPTH = 8
SPARE_BYTES = 1 << 30  # beside twice the file: once mapped, and at worst once more for copies
CPU_SECONDS = 3600
CHUNK = 1 << 20

# Name -> number on x86-64 and on arm64 (None: that machine has no such call). What reading, computing and ending need.
_CALLS = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "lseek": (8, 62), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None),
    "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "getpid": (39, 172), "exit": (60, 93),
    "uname": (63, 160), "fcntl": (72, 25), "getcwd": (79, 17), "readlink": (89, None), "getrusage": (98, 165), "sysinfo": (99, 179),
    "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "sigaltstack": (131, 132),
    "gettid": (186, 178), "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61), "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48),
    "set_robust_list": (273, 99), "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291), "rseq": (334, 293),
}  # fmt: skip
_MMAP, _MPROTECT, _OPENAT, _IOCTL, _SECCOMP = (9, 222), (10, 226), (257, 56), (16, 29), (317, 277)
_FIRST_COMMON = 424  # from here on a call has one number on every machine; the C library does without any of them
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF: ld [k], jeq, jge, jset, ret
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_PROT_EXEC = 4
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Refused(Exception):
    """Why the file was not read, in words for its owner."""


def _filter(machine: str) -> bytes:
    """The BPF program over struct seccomp_data: int nr; u32 arch; u64 instruction_pointer, args[6]."""
    column = list(_ARCHITECTURES).index(machine)
    number, arch, third_argument = 0, 4, 32

    def op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, k)

    def refuse_bits(call: tuple[int, int], bits: int) -> bytes:  # the accumulator holds `number` only if the call is another
        return b"".join((
            op(_EQUAL, call[column], 0, 4), op(_LOAD, third_argument), op(_ANY_BIT, bits, 1, 0), op(_RETURN, _ALLOW),
            op(_RETURN, _ERRNO | errno.EACCES),
        ))  # fmt: skip

    program = [op(_LOAD, arch), op(_EQUAL, _ARCHITECTURES[machine], 1, 0), op(_RETURN, _KILL), op(_LOAD, number)]
    for numbers in _CALLS.values():
        if numbers[column] is not None:
            program += [op(_EQUAL, numbers[column], 0, 1), op(_RETURN, _ALLOW)]
    program += [refuse_bits(_MMAP, _PROT_EXEC), refuse_bits(_MPROTECT, _PROT_EXEC), refuse_bits(_OPENAT, _WRITES)]
    program += [op(_EQUAL, _IOCTL[column], 0, 1), op(_RETURN, _ERRNO | errno.ENOTTY)]
    program += [op(_AT_LEAST, _FIRST_COMMON, 0, 1), op(_RETURN, _ERRNO | errno.ENOSYS), op(_RETURN, _ERRNO | errno.EPERM)]
    return b"".join(program)


def lock_down(data_bytes: int) -> None:
    """Give up, for good and in every thread, all that reading a file of `data_bytes` does not need; raises Refused."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _ARCHITECTURES:
        raise Refused(f"a process cannot be locked down on {sys.platform} {machine}, expected linux on {' or '.join(_ARCHITECTURES)}")
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * mmap.PAGESIZE
    limits = {
        resource.RLIMIT_AS: mapped + 2 * data_bytes + SPARE_BYTES,
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for what, value in limits.items():
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (min(value, hard),) * 2 if hard != resource.RLIM_INFINITY else (value, value))

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    code = _filter(machine)
    program = Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_mode_filter, every_thread = 38, 1, 1
    done = libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0 and 0 == libc.syscall(
        ctypes.c_long(_SECCOMP[list(_ARCHITECTURES).index(machine)]), ctypes.c_long(set_mode_filter), ctypes.c_long(every_thread),
        ctypes.byref(program),
    )  # fmt: skip
    if not done:
        raise Refused(f"the kernel does not lock the process down: seccomp: {os.strerror(ctypes.get_errno())}")


# ------------------------------------------------------------------------------------------------ reading and serving


def walk(value, is_tensor) -> tuple[list, list[str]]:
    """([(path, tensor)], [what else there is]) of nested dictionaries, in their order."""
    tensors, others = [], []

    def visit(path: tuple[str, ...], value) -> None:
        if is_tensor(value):
            tensors.append((path, value))
        elif isinstance(value, dict) and len(path) < MAX_DEPTH:
            for key, item in value.items():
                visit((*path, str(key)), item)
        else:
            others.append(f"{'/'.join(path)} ({type(value).__name__})")
        if len(tensors) + len(others) > MAX_TENSORS:
            raise Refused(f"has more than {MAX_TENSORS:,} entries")

    visit((), value)
    return tensors, others


def _mapping(path: str) -> tuple[int, int]:
    """Where the file is mapped: first address and end; (0, 0) if it is not."""
    spans = []
    with open("/proc/self/maps") as file:
        for line in file:
            if line.rstrip("\n").endswith(f" {path}"):
                spans.append([int(address, 16) for address in line.split()[0].split("-")])
    return (min(begin for begin, _ in spans), max(end for _, end in spans)) if spans else (0, 0)


def _write(data: memoryview) -> None:
    while len(data):
        data = data[os.write(1, data[:CHUNK]) :]


def main(libraries: str, path: str) -> None:
    sys.path.append(libraries)
    import torch

    torch.set_num_threads(1)
    path = os.path.realpath(path)
    blank = io.BytesIO()  # what torch.load imports on its first call must be there before the door closes
    torch.save({"": torch.zeros(1)}, blank)
    torch.load(io.BytesIO(blank.getvalue()), weights_only=True)
    torch.zeros(2).view(torch.uint8).numpy()
    try:
        lock_down(os.stat(path).st_size)
        tensors, others = walk(torch.load(path, map_location="cpu", weights_only=True, mmap=True), lambda v: isinstance(v, torch.Tensor))
        listing = []
        for name, tensor in tensors:
            plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
            dtype = str(tensor.dtype).removeprefix("torch.") if plain else f"{tensor.layout} on {tensor.device.type}"
            listing.append([name, dtype, list(tensor.shape)])
    except Exception as error:  # any: what the file did wrong is its reader's to report
        print(json.dumps({"error": str(error)[:4000], "kind": type(error).__name__}), flush=True)
        return
    print(json.dumps({"tensors": listing, "others": others[:100]}), flush=True)
    libc, page = ctypes.CDLL(None), mmap.PAGESIZE
    begin, end = _mapping(path)
    for line in sys.stdin:
        tensor = tensors[int(line)][1].detach()
        dense = tensor.contiguous()
        _write(memoryview(dense.reshape(-1).view(torch.uint8).numpy()))
        first, last = -(-dense.data_ptr() // page) * page, (dense.data_ptr() + dense.nbytes) // page * page
        if begin <= first < last <= end:  # these pages are the file's own: let them go, or in the end the whole file is resident
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


if __name__ == "__main__":
    main(*sys.argv[1:])
