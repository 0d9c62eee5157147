"""The embedded default: a whole safe merge, from nothing to a table, without a network."""

from .demo import run_demo
from .demo_models import DemoSettings
from .demo_table import Scores

__all__ = ["DemoSettings", "Scores", "run_demo"]
