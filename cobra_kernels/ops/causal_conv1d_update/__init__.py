from .op import causal_conv1d_update

__all__ = ["causal_conv1d_update"]
