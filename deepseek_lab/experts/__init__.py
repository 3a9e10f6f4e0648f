"""Only the relevant part: who computes what for each token."""

from . import balance
from .layer import ExpertLayer, SwiGLU
from .router import Router, Routing
from .trace import LayerTrace, RoutingTrace, trace_routing

__all__ = [
    "ExpertLayer",
    "LayerTrace",
    "Router",
    "Routing",
    "RoutingTrace",
    "SwiGLU",
    "balance",
    "trace_routing",
]
