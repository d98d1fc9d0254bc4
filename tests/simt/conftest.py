"""The host module: built when a source changed, imported once per worker."""

from __future__ import annotations

import pytest

from tests.simt import harness


@pytest.fixture(scope="session")
def built_host():
    """cobra_kernels_host, plain."""
    try:
        return harness.load_module(harness.build_module("host"))
    except (ImportError, RuntimeError) as error:  # no compiler, ninja, pybind11 or Python.h: a build without kernels is legal
        pytest.skip(f"cobra_kernels_host cannot be built: {error}")


@pytest.fixture
def host(built_host):
    """The module with every option at its default."""
    built_host.set_simt()
    built_host.set_threads(1)
    return built_host
