"""MMTok: training-free vision-token selection by greedy multimodal maximum coverage, made deployable."""

from mmtok_deploy.budget import Budget
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.problem import Selection
from mmtok_deploy.selection import SelectionError, select_tokens

__all__ = ["Budget", "Selection", "SelectionConfig", "SelectionError", "__version__", "select_tokens"]

__version__ = "0.1.0"
