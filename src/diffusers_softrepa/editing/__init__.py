"""Editing of images by text, with or without soft tokens: FlowEdit, and inversion followed by regeneration.

The pipeline is left as it was; its scheduler is copied, never changed.
"""

from .flow import flow_edit
from .inversion import invert, regenerate

__all__ = ["flow_edit", "invert", "regenerate"]
