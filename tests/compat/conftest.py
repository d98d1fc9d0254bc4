"""install() around a test, and its traces removed after it."""

from __future__ import annotations

import pytest

from cobra_kernels import compat


@pytest.fixture
def shims():
    """mamba_ssm and causal_conv1d are ours for this test."""
    compat.install(force=True)
    yield
    compat.uninstall()
