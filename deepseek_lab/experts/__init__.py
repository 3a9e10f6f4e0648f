"""Only the relevant part: who computes what for each token."""

from . import balance
from .layer import ExpertLayer, SwiGLU
from .router import Router, Routing

__all__ = ["ExpertLayer", "Router", "Routing", "SwiGLU", "balance"]
