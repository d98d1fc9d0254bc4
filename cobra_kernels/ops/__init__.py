"""One folder per op ("room"): op.py is the contract, reference.py the meaning, csrc/<op>/ the kernels."""

from .causal_conv1d import op as _causal_conv1d
from .causal_conv1d_update import op as _causal_conv1d_update
from .mamba_inner import op as _mamba_inner
from .projector import op as _projector
from .rms_norm import op as _rms_norm
from .selective_scan import op as _selective_scan
from .selective_state_update import op as _selective_state_update

# op -> (plan, BACKENDS): what supports() asks.
PLANS = {
    "rms_norm": (_rms_norm.plan, _rms_norm.BACKENDS),
    "selective_scan": (_selective_scan.plan, _selective_scan.BACKENDS),
    "causal_conv1d": (_causal_conv1d.plan, _causal_conv1d.BACKENDS),
    "causal_conv1d_update": (_causal_conv1d_update.plan, _causal_conv1d_update.BACKENDS),
    "selective_state_update": (_selective_state_update.plan, _selective_state_update.BACKENDS),
    "mamba_inner": (_mamba_inner.plan, _mamba_inner.BACKENDS),
    "mlp_projector": (_projector.plan_mlp, _projector.BACKENDS),
    "ldp_projector": (_projector.plan_ldp, _projector.BACKENDS),
}
