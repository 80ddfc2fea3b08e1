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
from data.memory import PLACES, check_data_on, in_memory
from data.mixup import MIXUP_MODES, Mixup
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

__all__ = ["FILTERS", "MIXUP_MODES", "PLACES", "Batch", "BatchTransform", "ImageBatch",
           "ImageSource", "Loader", "Metric", "Mixup", "check_data_on", "class_words",
           "create_dataset", "create_splits", "describe_eval", "eval_loader", "eval_transform",
           "imagenet_wnids", "in_memory", "keep_labels", "list_datasets", "read_image", "to_rgb",
           "train_loader", "train_transform", "warp_transform"]
