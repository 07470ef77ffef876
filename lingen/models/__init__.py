"""The models: one backbone, two mixers."""

from lingen.models.backbone import Backbone
from lingen.models.build import make_model

__all__ = ["Backbone", "make_model"]
