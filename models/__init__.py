"""Every network, teacher or student. A new one is a file here and its import below."""
from models import convnext, resnet, slak, transformers  # noqa: F401  (importing registers them)
from models.base import FeatureInfo, ModelOutput, VisionModel, create_model, list_models

__all__ = ["FeatureInfo", "ModelOutput", "VisionModel", "create_model", "list_models"]
