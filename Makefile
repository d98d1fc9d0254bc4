# Every verb of the project. `make` alone lists them. A fresh machine needs python3, g++ and one of the verbs.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.SUFFIXES:

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PY := $(VENV)/bin/python
export MAX_JOBS ?= 2

# The GPU verbs use the Python that already has a CUDA build of torch, and install nothing.
GPU_PYTHON ?= python3
OUT ?= out/gpu
ALL_ARCHS := 8.0;8.6;8.9;9.0a;10.0;12.0

help:  ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.ready: pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check --upgrade pip "setuptools>=77" wheel ninja pybind11
	$(PY) -m pip install -q --disable-pip-version-check $(TORCH)
	$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[dev]'
	@touch $@

setup: $(VENV)/.ready  ## virtual environment, dependencies, compiled kernels
	@$(PY) csrc/build.py ext

demo: setup  ## one photo, Cobra next to a Transformer: table, plots, out/demo/report.html
	$(PY) -m benchmarks.model.demo

test: setup  ## the whole test suite, with its own time table
	$(PY) tests/run.py

bench: setup  ## every bench against the roofs of this machine; records in benchmarks/results/
	$(PY) -m benchmarks

room: setup  ## ROOM=<op>: rebuild, that room's tests, its kernels under sanitizers, its bench
	@test -n "$(ROOM)" || { echo "usage: make room ROOM=rms_norm [BACKEND=cpu]"; exit 2; }
	@$(PY) tests/room.py $(ROOM) $(if $(BACKEND),--backend $(BACKEND))

sanitize: setup  ## CPU and CUDA kernels on a CPU under ASan, UBSan and TSan
	$(PY) csrc/build.py asan tsan
	$(PY) tests/simt/run_sanitized.py

mutate: setup  ## seeded faults, one at a time: does the suite notice? [ONLY=pattern] [KEEP=1] [RECORD=1] (25 minutes; resumes)
	@$(PY) tests/mutation/run.py $(if $(ONLY),--only '$(ONLY)') $(if $(KEEP),--keep) $(if $(RECORD),--record)

nvcc-check: setup  ## every CUDA kernel for every architecture against csrc/nvcc_table.tsv; zero spills [ROOM=<op>] [UPDATE=1] [ARCHS="80 90a"]
	@ARCHS="$(ARCHS)" ROOM="$(ROOM)" UPDATE="$(UPDATE)" $(PY) csrc/build.py nvcc-check

sass: setup  ## KERNEL=<name>: issue slots, MUFU and bytes of a kernel's inner loops, from its disassembly [ARCH=90a] [ELEMENTS=n]
	@test -n "$(KERNEL)" || { echo "usage: make sass KERNEL=rms_norm_fwd_vector_kernel [ARCH=90a] [ELEMENTS=32]"; exit 2; }
	@$(PY) csrc/sass.py '$(KERNEL)' $(if $(ARCH),--arch $(ARCH)) $(if $(ELEMENTS),--elements $(ELEMENTS))

wheel: setup  ## dist/*.whl (all GPU images) and the sdists of both distributions
	TORCH_CUDA_ARCH_LIST="$(ALL_ARCHS)" $(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist ./cobra
	$(PY) -c "from setuptools import build_meta as b; print('sdist:', b.build_sdist('dist'))" | tail -1
	@ls -1 dist

lint: setup  ## ruff
	$(PY) -m ruff check .

gpu: gpu-test gpu-bench gpu-sanitize  ## on a CUDA machine: the three below, in this order

gpu-test:  ## CUDA machine: build, streams and graphs, the suite on cuda and triton, selftest (6 minutes on 16 cores)
	@$(GPU_PYTHON) -m tests.gpu.run test --out $(OUT)

gpu-bench:  ## CUDA machine: every bench with its peers [PEERS=folder of sdists], records under $OUT (8 minutes)
	@$(GPU_PYTHON) -m tests.gpu.run bench --out $(OUT) $(if $(PEERS),--peers $(PEERS))

gpu-sanitize:  ## CUDA machine: memcheck, racecheck, initcheck, synccheck on boundary cases (8 minutes)
	@$(GPU_PYTHON) -m tests.gpu.run sanitize --out $(OUT)

gpu-profile:  ## CUDA machine: KERNEL=<name>: issue slots, MUFU, DRAM, L2 of one kernel, by ncu [OP=<op>] [SHAPE=<shape>]
	@test -n "$(KERNEL)" || { echo "usage: make gpu-profile KERNEL=selective_scan [OP=selective_scan] [SHAPE=cobra-3b-2k]"; exit 2; }
	@$(GPU_PYTHON) -m tests.gpu.run profile $(KERNEL) --out $(OUT) $(if $(OP),--op $(OP)) $(if $(SHAPE),--shape $(SHAPE))

clean:  ## remove what was built (not the virtual environment)
	rm -rf build out dist *.egg-info cobra/*.egg-info cobra_kernels/_C.abi3.so

.PHONY: help setup demo test bench room sanitize mutate nvcc-check sass wheel lint gpu gpu-test gpu-bench gpu-sanitize gpu-profile clean
