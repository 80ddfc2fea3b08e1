"""Networks of the user's own: `my_module:build` names a function that returns one."""
import functools
import importlib
import os
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from typing import Any

from torch import Tensor, nn

from models.base import ModelOutput, VisionModel
from models.library import LibraryNetwork, build_with
from utils.registry import UserError


class UserNetwork(LibraryNetwork):
    """A module of the user's own that gives logits (N, num_classes). Its maps are not known, so
    only losses of logits can be offered; a VisionModel of the user's own declares them."""

    feature_info = ()
    classifiers = ()

    def __init__(self, network: nn.Module, what: str) -> None:
        super().__init__(network)
        self.what = what
        self.num_classes = build_with(lambda: self._probe(self.input_size), f"{what}, given images "
                                      f"(1, 3, {self.input_size}, {self.input_size})"
                                      ).logits.shape[1]

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        logits = self.network(images)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"{self.what} gives {got}, expected logits (N, classes). Return a "
                            "VisionModel of models/base.py to give feature maps, too.")
        return ModelOutput(logits, [])


def own_builder(name: str) -> Callable[..., VisionModel]:
    """`module:function` from the working folder or PYTHONPATH. Nothing from elsewhere is called: a
    checkpoint names its network, too, and must not be able to start any function there is."""
    module_name, _, function_name = name.partition(":")
    folders = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    found = PathFinder.find_spec(module_name.partition(".")[0], folders)
    if found is None or not function_name:
        raise UserError(f"{name!r} names a function of your own as module:function, and there is "
                        f"no module {module_name!r} in {' or '.join(folders)}.")
    sys.path += [folder for folder in folders if folder not in sys.path]
    module = build_with(importlib.import_module, f"cannot import {module_name}", module_name)
    function = getattr(module, function_name, None)
    place = sys.modules[found.name]
    if found.origin not in (None, place.__file__):
        raise UserError(f"{found.origin} has the name of another module, {place.__file__}. Rename "
                        "it.")
    is_its_own = getattr(function, "__module__", "").partition(".")[0] == found.name
    if not callable(function) or not is_its_own:
        raise UserError(f"{module.__file__} defines no function {function_name!r}.")

    @functools.wraps(function)
    def build(**options: Any) -> VisionModel:
        network = build_with(function, name, **options)
        if isinstance(network, VisionModel):
            return network
        if isinstance(network, nn.Module):
            return UserNetwork(network, name)
        raise UserError(f"{name} gives a {type(network).__name__}, expected an nn.Module.")

    return build
