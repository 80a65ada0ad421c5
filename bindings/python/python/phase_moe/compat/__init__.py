"""The published phase router package under its own names: change the import and nothing else.

``import phase_router_rs`` becomes ``from phase_moe.compat import phase_router_rs``, and ``import phase_router`` becomes
``from phase_moe.compat import phase_router``. Same names, arguments, defaults and results, the same bits for the same seed; what is an assertion or a
panic there is a ``ValueError`` here.
"""

from . import phase_router, phase_router_rs

__all__ = ["phase_router", "phase_router_rs"]
