"""Which network a state dict belongs to, told from its names and shapes alone."""
from collections.abc import Mapping

import torch
from torch import Tensor

from models.base import MODELS, create_model

# Buffers that hold nothing learned. Files older than torch 0.4.1 do not count BatchNorm's batches.
COMPUTED = ("relative_position_index", "attn_mask", "num_batches_tracked")


def learned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without what a file need not have."""
    return {name: value for name, value in state.items() if not name.endswith(COMPUTED)}


def describe_origin(state: Mapping[str, Tensor]) -> str:
    """'These are weights of slak_t kernel_size=31,29,27,13,5. ', or of which they are the nearest;
    empty where nothing is near. Builds every registered network, without memory for weights."""
    best, best_share = "", 0.5  # below a half it says nothing
    for name in MODELS.names():
        words, share = _fit(name, state)
        if share == 1:
            return f"These are weights of {words}. "
        if share > best_share:
            best, best_share = words, share
    return f"The nearest network is {best}, {best_share:.0%} of whose tensors fit. " if best else ""


def _fit(name: str, state: Mapping[str, Tensor]) -> tuple[str, float]:
    """The words that name this network with the options that the shapes tell, and the share of
    tensors, of the file's and its own, that the two have in common."""
    try:
        options = MODELS.builder(name).options_of(state)
        with torch.device("meta"):
            model = create_model(name, _num_classes(state), **options)
        theirs = learned(model.translated(dict(state)))
    except (ValueError, TypeError, RuntimeError, LookupError):  # something else altogether
        return name, 0.0
    ours = learned(model.state_dict())
    common = sum(key in theirs and theirs[key].shape == value.shape for key, value in ours.items())
    defaults = MODELS.defaults(name)
    words = [f"{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
             for key, value in options.items() if value != defaults.get(key)]
    return " ".join([name, *words]), common / len(ours.keys() | theirs.keys())


def _num_classes(state: Mapping[str, Tensor]) -> int:
    """The length of the last vector, which is the classifier's bias in every published file."""
    return len([value for value in state.values() if value.dim() == 1][-1])
