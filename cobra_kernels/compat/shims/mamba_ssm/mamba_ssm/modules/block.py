"""Where mamba_ssm 2.x keeps Block."""

from cobra_kernels.modules.mamba import Block

__all__ = ["Block"]
