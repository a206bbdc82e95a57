"""monokernel: the penalty that makes ``y = NN(cat[x1, x2])`` monotone in x2, fused."""

from ._version import __version__
from .api import MonotonePenalty, fused_mono_penalty, value_and_jacobian
from .audit import audit
from .certify import Certificate, certify
from .monotone import Monotone
from .multipliers import Multipliers
from .planning import Plan, plan
from .plots import plot_audit
from .report import Audit
from .sampling import sample_points
from .steps import Steps

__all__ = [
    "Audit",
    "Certificate",
    "Monotone",
    "MonotonePenalty",
    "Multipliers",
    "Plan",
    "Steps",
    "__version__",
    "audit",
    "certify",
    "fused_mono_penalty",
    "plan",
    "plot_audit",
    "sample_points",
    "value_and_jacobian",
]
