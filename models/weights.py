"""Weights from files and addresses: read safely, loaded strictly, refused with a readable diff."""
import hashlib
import re
import urllib.error
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.base import MODELS, VisionModel, create_model
from utils.checkpoint import load_file
from utils.distributed import barrier, is_first_here
from utils.log import print_once
from utils.registry import UserError, parse_spec

# Containers that published files keep their weights in, in the order they are looked for.
CONTAINERS = ("model", "state_dict", "model_ema", "state_dict_ema")
PREFIXES = ("module.", "student.", "backbone.")

_SURF = "https://surfdrive.surf.nl/files/index.php/s/{}/download"
_DRIVE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"
_META = "https://dl.fbaipublicfiles.com/convnext/convnext_{}_1k_224_ema.pth"
_DEIT = "https://dl.fbaipublicfiles.com/deit/deit_{}.pth"
_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/{}.pth"
_TORCHVISION = "https://download.pytorch.org/models/{}.pth"


class Published(NamedTuple):
    url: str
    top1: float | None  # ImageNet-1K, as its publisher states it; None: it does not
    size: int = 224  # pixels, at which that is
    is_hashed: bool = False  # whether the name ends in the start of the file's sha256


# ImageNet-1K weights by registered model name, default options.
PUBLISHED = {
    "slak_t": Published(_DRIVE.format("1Iut2f5FMS_77jGPYoUJDQzDIXOsax1u4"), 82.5),
    "slak_s": Published(_DRIVE.format("1etM6KQbnlsgDAZ37adsQJ3UI8Bbv2AVe"), 83.8),
    "slak_b": Published(_DRIVE.format("1duUxUD3RSblQ6eDHd0n-u0aulwGypf1j"), 84.0),
    "convnext_t_bn": Published(_SURF.format("cR6KLvxjlUshUQA"), 83.1),
    "convnext_s_bn": Published(_SURF.format("PYqL3rVff3Nu2sP"), 84.3),
    "convnext_t": Published(_META.format("tiny"), 82.1),
    "convnext_s": Published(_META.format("small"), 83.1),
    "convnext_b": Published(_META.format("base"), 83.8),
    "resnet18": Published(_TORCHVISION.format("resnet18-f37072fd"), 69.758, 224, True),
    "resnet34": Published(_TORCHVISION.format("resnet34-b627a593"), 73.314, 224, True),
    "resnet50": Published(_TORCHVISION.format("resnet50-11ad3fa6"), 80.858, 224, True),
    "resnet101": Published(_TORCHVISION.format("resnet101-cd907fc2"), 81.886, 224, True),
    "swin_t": Published(_TORCHVISION.format("swin_t-704ceda3"), 81.474, 224, True),
    "mobilenetv3_l": Published(_TORCHVISION.format("mobilenet_v3_large-5c1a4163"), 75.274, 224,
                               True),
    "efficientnet_b3": Published(_TORCHVISION.format("efficientnet_b3_rwightman-b3899882"), 82.008,
                                 300, True),
    "deit_s": Published(_DEIT.format("small_patch16_224-cd65a155"), 79.86, 224, True),
    "resnet50d": Published(_TIMM.format("v0.1-weights/resnet50d_ra2-464e36ba"), 80.55),
    "vit_s": Published(_TIMM.format("v0.1-weights/vit_small_p16_224-15ec54c9"), None),
    "vit_b": Published(_TIMM.format("v0.1-vitjx/jx_vit_base_p16_224-80ecf9dd"), 81.78),
}


def fetch_weights(model: nn.Module, name: str, source: str, flag: str,
                  key: str | None = None, dry_run: bool = False) -> None:
    """Load what `flag` names into `model`, registered as `name`: a path, an address, `published`,
    or `random`, which leaves it as it is. One process of a machine downloads. In a dry run it is
    enough that published weights have an address."""
    if source == "random":
        return
    try:
        address = published_source(name) if source == "published" else source
        if dry_run and source == "published":
            return print_once(f"{flag} published: {address}, not fetched in a dry run")
        if is_first_here():
            local_file(address)
        barrier()
        load_weights(model, address, key)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


def published_source(model_name: str) -> str:
    """The address of the published weights of a registered model."""
    if model_name not in PUBLISHED:
        raise UserError(f"no published weights are known for {model_name!r} (known: "
                        f"{', '.join(PUBLISHED)}). Pass a file or an address, or the word random.")
    return PUBLISHED[model_name].url


def published_table() -> str:
    """A Markdown table of the known addresses."""
    rows = ["| name | top-1 % | px | address |", "|---|---:|---:|---|"]
    rows += [f"| {name} | {known.top1 or 'not stated'} | {known.size} | {known.url} |"
             for name, known in PUBLISHED.items()]
    return "\n".join(rows)


def load_weights(model: nn.Module, source: str | Path, key: str | None = None) -> None:
    """Load a file or an address strictly into `model`, and say which of its weights.

    `key` names the container to take (`model`, `model_ema`, ...); by default the first that is
    there, but the average from a checkpoint-best-ema.pth, which was chosen for it.
    Raises UserError with what is missing, unexpected or of another shape.
    """
    found = translated(model, read_state_dict(local_file(source), key))
    state, own = learned(found), model.state_dict()
    wanted = learned(own)
    difference = describe_difference(state, wanted)
    if difference:
        raise UserError(f"{source} does not fit {type(model).__name__}: {difference} "
                        f"{_class_hint(state, wanted, getattr(model, 'num_classes', None))}"
                        f"{describe_origin(found)}Check the model's name and options.")
    counts = {name: value for name, value in found.items() if name in own
              and name.endswith("num_batches_tracked") and value.shape == own[name].shape}
    model.load_state_dict({**state, **counts}, strict=False)  # checked above


def translated(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` under the names of `model`, where that is one that knows other names."""
    state = {name: value.detach() for name, value in state.items()}  # some files hold Parameters
    return model.translated(state) if isinstance(model, VisionModel) else state


def read_state_dict(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a file, without the prefix of a wrapper. Runs no code from the file."""
    content = load_file(path)
    containers = [name for name in CONTAINERS if isinstance(content.get(name), dict)]
    if key is not None and key not in containers:
        raise UserError(f"{path} has no weights under {key!r}; it has "
                        f"{', '.join(containers) or 'a bare state dict'}.")
    if key is None and containers:
        is_for_average = path.name.endswith("-best-ema.pth") and "model_ema" in containers
        key = "model_ema" if is_for_average else containers[0]
    print_once(f"weights: {path}" + (f", {key}" if key else ""))
    state = content[key] if key else content
    state = {name: value for name, value in state.items()
             if isinstance(name, str) and isinstance(value, Tensor)}
    if not state:
        keys = ", ".join(str(key) for key in list(content)[:8])
        raise UserError(f"{path} holds no weights: expected a state dict, or one under "
                        f"{', '.join(CONTAINERS)}; got the keys {keys}.")
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), ""):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def describe_difference(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """What separates two state dicts, in a sentence each; empty when they fit."""
    shapes = [f"{name} {tuple(got[name].shape)} instead of {tuple(wanted[name].shape)}"
              for name in wanted if name in got and got[name].shape != wanted[name].shape]
    groups = {"missing": [name for name in wanted if name not in got],
              "unexpected": [name for name in got if name not in wanted],
              "of another shape": shapes}
    sentences = []
    for what, names in groups.items():
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            sentences.append(f"{len(names)} {what} ({', '.join(names[:4])}{more}).")
    return " ".join(sentences)


def _class_hint(got: dict[str, Tensor], wanted: dict[str, Tensor], num_classes: int | None) -> str:
    """A sentence when the file and the model differ in the number of classes."""
    for name, value in wanted.items():
        shapes = (value.shape, got[name].shape if name in got else value.shape)
        if shapes[0] != shapes[1] and shapes[0][1:] == shapes[1][1:] and len(value) == num_classes:
            return (f"The file is for {len(got[name])} classes, the data has {num_classes} (or "
                    "--num-classes says so). ")
    return ""


def local_file(source: str | Path) -> Path:
    """`source` itself when it is a path; an address is downloaded once into torch.hub's cache."""
    if not str(source).startswith(("http://", "https://")):
        return Path(source)
    url = str(source)
    parts = urllib.parse.urlparse(url)
    query = urllib.parse.parse_qs(parts.query)
    name = Path(parts.path).name
    if name == "download":  # a share's address; its token names the file
        name = (query.get("id") or [Path(parts.path).parts[-2]])[0] + ".pth"
    if url not in {published.url for published in PUBLISHED.values()}:
        # Two runs' checkpoint-best.pth are two files.
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        _download(url, path)
    return path


def _download(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_hashed = any(published.is_hashed for published in PUBLISHED.values()
                    if published.url == url) or url.startswith(_TORCHVISION.partition("{")[0])
    try:
        torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2] if is_hashed
                                       else None)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UserError(f"could not fetch {url} ({error}). Fetch it by hand and pass the file's "
                        f"path, or put it at {path}.") from None
    try:
        load_file(path)
    except UserError as error:  # a share may answer with a page instead of the file
        path.unlink()
        raise UserError(f"{url} did not give a checkpoint ({error}). Fetch it by hand and pass "
                        "the file's path.") from None


Rules = Sequence[tuple[str, str]]  # pattern of a whole name, replacement


def renamed(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """`state` with each name rewritten by the first rule that fits it; others stay. Raises
    UserError where two names become one."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    result = {}
    for name, value in state.items():
        rule = next(((p, r) for p, r in compiled if p.fullmatch(name)), None)
        new = rule[0].sub(rule[1], name) if rule else name
        if new in result:
            raise UserError(f"the file names {new} twice, as {name} and otherwise; it mixes the "
                            "checkpoints of two programs.")
        result[new] = value
    return result


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
