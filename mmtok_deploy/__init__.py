"""MMTok: training-free vision-token selection by greedy multimodal maximum coverage, made deployable."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmtok_deploy.budget import Budget
    from mmtok_deploy.config import SelectionConfig
    from mmtok_deploy.problem import Selection
    from mmtok_deploy.selection import SelectionError, select_tokens

__all__ = ["Budget", "Selection", "SelectionConfig", "SelectionError", "__version__", "select_tokens"]

__version__ = "0.1.0"

_MODULES = {
    "Budget": "budget",
    "Selection": "problem",
    "SelectionConfig": "config",
    "SelectionError": "selection",
    "select_tokens": "selection",
}


def __getattr__(name: str) -> Any:
    """Returns a public name, imported on first use, so that the command line starts without loading PyTorch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
