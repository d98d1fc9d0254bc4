"""One folder per op ("room"): op.py is the contract, reference.py the meaning, csrc/<op>/ the kernels."""

from .rms_norm import op as _rms_norm

# op -> (plan, BACKENDS): what supports() asks.
PLANS = {
    "rms_norm": (_rms_norm.plan, _rms_norm.BACKENDS),
}
