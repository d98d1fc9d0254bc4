"""Code written for mamba_ssm, causal_conv1d or Hugging Face transformers, on our kernels: `cobra_kernels.compat.install()`."""

from .install import install, installed, uninstall
from .transformers import apply_to_transformers, undo

__all__ = ["apply_to_transformers", "install", "installed", "undo", "uninstall"]
