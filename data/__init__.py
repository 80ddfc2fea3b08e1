"""Data sets, transforms, loaders, and what the device does with a batch: normalising, mixup."""
from data import (  # noqa: F401  (importing registers them)
    folders,
    layouts,
    outlines,
    robustness,
    shards,
    torchvision_sets,
)
from data.batch import Batch, BatchTransform, ImageBatch
from data.datasets import (
    DATASETS,
    ImageSource,
    Metric,
    create_dataset,
    create_splits,
    keep_labels,
    list_datasets,
)
from data.images import read_image, to_rgb
from data.layouts import class_words
from data.loader import Loader, eval_loader, train_loader
from data.mixup import Mixup
from data.transforms import (
    FILTERS,
    describe_eval,
    eval_transform,
    train_transform,
    warp_transform,
)
from utils.classes import imagenet_wnids

# What DeiT and ConvNeXt call them.
DATASETS.add_aliases({"CIFAR": "cifar100", "IMNET": "imagenet", "image_folder": "imagefolder"})

__all__ = ["FILTERS", "Batch", "BatchTransform", "ImageBatch", "ImageSource", "Loader", "Metric",
           "Mixup", "class_words", "create_dataset", "create_splits", "describe_eval",
           "eval_loader", "eval_transform", "imagenet_wnids", "keep_labels", "list_datasets",
           "read_image", "to_rgb", "train_loader", "train_transform", "warp_transform"]
