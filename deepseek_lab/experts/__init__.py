"""Only the relevant part: who computes what for each token."""

from . import balance
from .layer import ExpertLayer, SwiGLU
from .placement import (
    LayerTraffic,
    Placement,
    Traffic,
    balanced_packing,
    place,
    replicate_experts,
    trace_traffic,
    traffic,
)
from .router import Router, Routing
from .trace import Choice, LayerTrace, RoutingTrace, trace_routing

__all__ = [
    "Choice",
    "ExpertLayer",
    "LayerTrace",
    "LayerTraffic",
    "Placement",
    "Router",
    "Routing",
    "RoutingTrace",
    "SwiGLU",
    "Traffic",
    "balance",
    "balanced_packing",
    "place",
    "replicate_experts",
    "trace_routing",
    "trace_traffic",
    "traffic",
]
