"""The embedded default: a whole safe merge, from nothing to a table, without a network."""

from .run import run_demo
from .settings import DemoSettings
from .table import Scores

__all__ = ["DemoSettings", "Scores", "run_demo"]
