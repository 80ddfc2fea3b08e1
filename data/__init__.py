"""Data sets, transforms, loaders, and what the device does with a batch: normalising, mixup."""
from data import outlines, robustness  # noqa: F401  (importing registers them)
from data.batch import Batch, BatchTransform, ImageBatch
from data.datasets import ImageSource, Metric, create_dataset, create_splits, list_datasets
from data.loader import Loader, eval_loader, train_loader
from data.mixup import Mixup
from data.transforms import eval_transform, train_transform, warp_transform

__all__ = ["Batch", "BatchTransform", "ImageBatch", "ImageSource", "Loader", "Metric", "Mixup",
           "create_dataset", "create_splits", "eval_loader", "eval_transform",
           "list_datasets", "train_loader", "train_transform", "warp_transform"]
