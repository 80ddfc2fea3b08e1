"""Data sets, transforms, loaders, samplers, and what the device does: preparation, mixup."""
from data.datasets import ImageSource, check_same_classes, create_dataset
from data.loader import Loader, eval_loader, train_loader
from data.mixup import Mixup
from data.preparation import Pictures, Preparation
from data.transforms import eval_transform, train_transform

__all__ = ["ImageSource", "Loader", "Mixup", "Pictures", "Preparation", "check_same_classes",
           "create_dataset", "eval_loader", "eval_transform", "train_loader", "train_transform"]
