"""Editing images by text, with soft tokens or without: FlowEdit, and inversion with re-generation.

The pipeline is used and left as it was: its scheduler is read, never set.
"""

from .flow import flow_edit
from .inversion import invert, regenerate

__all__ = ["flow_edit", "invert", "regenerate"]
