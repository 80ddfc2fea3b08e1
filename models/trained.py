"""Networks with the weights of a file: the student of a checkpoint, or any by its name."""
from pathlib import Path
from typing import Any, NamedTuple

from models.base import VisionModel, create_model
from models.weights import fetch_weights, load_weights
from utils.checkpoint import load_file
from utils.errors import UserError
from utils.registry import parse_spec


class Trained(NamedTuple):
    model: VisionModel
    settings: dict[str, Any]  # of the run, as args.yaml has them
    classes: list[str] | None  # names by label; None in files written before these were kept


def load_trained(path: Path, key: str | None = None) -> Trained:
    """The network with its weights, and what the file says of them. `key`: see `load_weights`."""
    content = load_file(path)
    settings = content.get("args")
    if not isinstance(settings, dict) or "student" not in settings:
        raise UserError(f"{path} does not say which model it holds; that is known only of the "
                        "checkpoints of train_kd.py. Use --model NAME --weights FILE instead.")
    name, options = parse_spec(settings["student"], "--student")
    model = create_model(name, settings["num_classes"], **options)
    load_weights(model, path, key)
    return Trained(model, settings, content.get("classes"))


def load_named(words: list[str], source: str, key: str | None, num_classes: int) -> VisionModel:
    """The network that `--model NAME key=value ...` names with the weights that --weights names;
    see `fetch_weights`."""
    name, options = parse_spec(words, "--model")
    model = create_model(name, num_classes, **options)
    fetch_weights(model, name, source, "--weights", key)
    return model
