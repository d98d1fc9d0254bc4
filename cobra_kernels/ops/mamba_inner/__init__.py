from .op import mamba_inner

__all__ = ["mamba_inner"]
