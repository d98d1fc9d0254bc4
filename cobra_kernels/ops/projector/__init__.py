from .op import ldp_projector, mlp_projector

__all__ = ["ldp_projector", "mlp_projector"]
