"""Data sets, transforms, loaders, samplers, and what the device does: preparation, mixup."""
from data import robustness  # noqa: F401  they register themselves
from data.batch import BatchTransform, ImageBatch
from data.datasets import ImageSource, align, check_same_classes, create_dataset, list_datasets
from data.loader import Loader, eval_loader, train_loader
from data.mixup import Mixup
from data.transforms import eval_transform, train_transform, warp_transform

__all__ = ["ImageSource", "Loader", "Mixup", "ImageBatch", "BatchTransform", "align",
           "check_same_classes", "create_dataset", "eval_loader", "eval_transform",
           "list_datasets", "train_loader", "train_transform", "warp_transform"]
