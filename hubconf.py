"""torch.hub: every network of the zoo by its name, and `distilled`, a trained student.

    torch.hub.list(REPOSITORY); torch.hub.help(REPOSITORY, "slak_t")
    model = torch.hub.load(REPOSITORY, "slak_t", weights="published")
    student = torch.hub.load(REPOSITORY, "distilled", "checkpoint-best.pth")
"""
import inspect as _inspect
from collections.abc import Callable as _Callable

from models import VisionModel as _VisionModel  # with underscores, as all other names are listed
from models.base import MODELS as _MODELS
from models.weights import load_named as _load_named
from predict import distilled  # noqa: F401  (an entry point)

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm", "yaml"]


def _word(key: str, value: object) -> str:
    """An option as the command line has it; a tuple of one keeps its comma."""
    if isinstance(value, (tuple, list)):
        value = "".join(f"{item}," for item in value)
    return f"{key}={value}"


def _entry(name: str) -> _Callable[..., _VisionModel]:
    def build(weights: str = "random", num_classes: int = 1000, **options: object) -> _VisionModel:
        spec = [name, *(_word(key, value) for key, value in options.items())]
        return _load_named(spec, weights, None, num_classes).eval()

    known = ", ".join(_word(key, value) for key, value in _MODELS.defaults(name).items()
                      if key not in ("num_classes", "weights"))
    about = _inspect.getdoc(_MODELS.builder(name))
    build.__name__ = name
    build.__doc__ = (f"{about}\n\nweights: random, published, a path or an address. num_classes: "
                     f"of the weights.\noptions: {known}")
    return build


globals().update({name: _entry(name) for name in _MODELS.names()})
