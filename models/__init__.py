"""Every network, teacher or student. A new one is a file here and its import below."""
# Importing registers them.
from models import convnext, cswin, efficient, resnet, slak, transformers  # noqa: F401
from models.base import FeatureInfo, ModelOutput, VisionModel, create_model, list_models

__all__ = ["FeatureInfo", "ModelOutput", "VisionModel", "create_model", "list_models"]
