"""Weights from files and addresses: read safely, loaded strictly, refused with a readable diff."""
import hashlib
import re
import urllib.error
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.base import MODELS, VisionModel, create_model
from utils.checkpoint import load_file
from utils.distributed import barrier, is_first_here
from utils.log import markdown_table, print_once
from utils.registry import UserError, parse_spec

# Containers that published files keep their weights in, in the order they are looked for.
CONTAINERS = ("model", "state_dict", "model_ema", "state_dict_ema")
PREFIXES = ("module.", "student.", "backbone.")  # of wrappers
# Buffers that hold nothing learned. Files older than torch 0.4.1 do not count BatchNorm's batches.
COMPUTED = ("relative_position_index", "attn_mask", "num_batches_tracked")

_SURF = "https://surfdrive.surf.nl/files/index.php/s/{}/download"
_DRIVE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"
_META = "https://dl.fbaipublicfiles.com/convnext/convnext_{}_1k_224_ema.pth"
_DEIT = "https://dl.fbaipublicfiles.com/deit/deit_{}.pth"
_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/{}.pth"
_TORCHVISION = "https://download.pytorch.org/models/{}.pth"
# Files whose names end in the start of their sha256 begin like this.
_HASHED = tuple(address.partition("{")[0] for address in (_TORCHVISION, _DEIT))


class Published(NamedTuple):
    url: str
    top1: float | None  # ImageNet-1K, as its publisher states it; None: it does not
    size: int = 224  # pixels, at which that is


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
    "resnet18": Published(_TORCHVISION.format("resnet18-f37072fd"), 69.758),
    "resnet34": Published(_TORCHVISION.format("resnet34-b627a593"), 73.314),
    "resnet50": Published(_TORCHVISION.format("resnet50-11ad3fa6"), 80.858),
    "resnet101": Published(_TORCHVISION.format("resnet101-cd907fc2"), 81.886),
    "swin_t": Published(_TORCHVISION.format("swin_t-704ceda3"), 81.474),
    "mobilenetv3_l": Published(_TORCHVISION.format("mobilenet_v3_large-5c1a4163"), 75.274),
    "efficientnet_b3": Published(_TORCHVISION.format("efficientnet_b3_rwightman-b3899882"), 82.008,
                                 300),
    "deit_s": Published(_DEIT.format("small_patch16_224-cd65a155"), 79.86),
    "resnet50d": Published(_TIMM.format("v0.1-weights/resnet50d_ra2-464e36ba"), 80.55),
    "vit_s": Published(_TIMM.format("v0.1-weights/vit_small_p16_224-15ec54c9"), None),
    "vit_b": Published(_TIMM.format("v0.1-vitjx/jx_vit_base_p16_224-80ecf9dd"), 81.78),
}


def published_source(model_name: str) -> str:
    """The address of the published weights of a registered model."""
    if model_name not in PUBLISHED:
        raise UserError(f"no published weights are known for {model_name!r} (known: "
                        f"{', '.join(PUBLISHED)}). Pass a file or an address, or the word random.")
    return PUBLISHED[model_name].url


def published_table() -> str:
    """A Markdown table of the known addresses."""
    rows = [(name, known.url, str(known.top1 or "not stated"), str(known.size))
            for name, known in PUBLISHED.items()]
    return markdown_table(("name", "address", "top-1 %", "px"), rows, num_text_columns=2)


def fetch_weights(model: VisionModel, name: str, source: str, flag: str,
                  key: str | None = None, dry_run: bool = False) -> None:
    """Load what `flag` names into `model`, registered as `name`: a path, an address, `published`,
    or `random`, which leaves it as it is. One process of a machine downloads. In a dry run it is
    enough that published weights have an address."""
    if source == "random":
        return
    try:
        address = published_source(name) if source == "published" else source
        if dry_run and source == "published":
            print_once(f"{flag} published: {address}, not fetched in a dry run")
            return
        if is_first_here():
            local_file(address)
        barrier()
        load_weights(model, address, key)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


def load_weights(model: VisionModel, source: str | Path, key: str | None = None) -> None:
    """Load a file or an address strictly into `model`, and say which of its weights.

    `key` names the container to take (`model`, `model_ema`, ...); by default the first that is
    there, but the average from a checkpoint-best-ema.pth, which was chosen for it.
    Raises UserError with what is missing, unexpected or of another shape.
    """
    state = model.convert_state_dict(read_state_dict(local_file(source), key))
    own = model.state_dict()
    got, wanted = without_computed(state), without_computed(own)
    difference = describe_difference(got, wanted)
    if difference:
        raise UserError(f"{source} does not fit {type(model).__name__}: {difference} "
                        f"{_describe_classes(got, wanted, model.num_classes)}"
                        f"{describe_origin(state)}Check the model's name and options.")
    counts = {name: value for name, value in state.items() if name in own
              and name.endswith("num_batches_tracked") and value.shape == own[name].shape}
    model.load_state_dict({**got, **counts}, strict=False)  # checked above


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


def load_named(spec: list[str], source: str, key: str | None, num_classes: int, *,
               flag: str = "--model", dry_run: bool = False) -> VisionModel:
    """The network that `{flag} NAME key=value ...` names with weights from `source`; see
    `fetch_weights`. Those of `--model` are named by `--weights`, of others by `{flag}-weights`."""
    name, options = parse_spec(spec, flag)
    model = create_model(name, num_classes, **options)
    weights_flag = "--weights" if flag == "--model" else f"{flag}-weights"
    fetch_weights(model, name, source, weights_flag, key, dry_run)
    return model


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
    if key is None:
        print_once(f"weights: {path}")
        state = content
    else:
        print_once(f"weights: {path}, {key}")
        state = content[key]
    state = {name: value.detach() for name, value in state.items()  # some files hold Parameters
             if isinstance(name, str) and isinstance(value, Tensor)}
    if not state:
        keys = ", ".join(str(key) for key in list(content)[:8])
        raise UserError(f"{path} holds no weights: expected a state dict, or one under "
                        f"{', '.join(CONTAINERS)}; got the keys {keys}.")
    while True:
        common = [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)]
        if not common:
            return state
        state = {name.removeprefix(common[0]): value for name, value in state.items()}


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
    sha256 = None  # its start
    if url.startswith(_HASHED):
        sha256 = path.stem.rpartition("-")[2]
    try:
        torch.hub.download_url_to_file(url, str(path), sha256)
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


def rename_keys(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """`state` with each name rewritten by the first rule that fits it; others stay. Raises
    UserError where two names become one."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    result = {}
    for name, value in state.items():
        new = name
        for pattern, replacement in compiled:
            if pattern.fullmatch(name):
                new = pattern.sub(replacement, name)
                break
        if new in result:
            raise UserError(f"the file names {new} twice, as {name} and otherwise; it mixes the "
                            "checkpoints of two programs.")
        result[new] = value
    return result


def without_computed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without what a file need not have."""
    return {name: value for name, value in state.items() if not name.endswith(COMPUTED)}


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


def _describe_classes(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor],
                      num_classes: int) -> str:
    """A sentence when the file and the model differ in the number of classes."""
    for name, value in wanted.items():
        other = got.get(name, value)
        if (other.shape != value.shape and other.shape[1:] == value.shape[1:]
                and value.shape[:1] == (num_classes,)):
            return (f"The file is for {len(other)} classes, the data has {num_classes} (or "
                    "--num-classes says so). ")
    return ""


def describe_origin(state: Mapping[str, Tensor]) -> str:
    """'These are weights of slak_t kernel_size=31,29,27,13,5. ', or of which they are the nearest;
    empty where nothing is near. Builds every registered network, without memory for weights."""
    nearest, best_share = "", 0.5  # below a half it says nothing
    for name in MODELS.names():
        spec, share = _compare(name, state)
        if share == 1:
            return f"These are weights of {spec}. "
        if share > best_share:
            nearest, best_share = spec, share
    if not nearest:
        return ""
    return f"The nearest network is {nearest}, {best_share:.0%} of whose tensors fit. "


def _compare(name: str, state: Mapping[str, Tensor]) -> tuple[str, float]:
    """This network as one would name it, with the options that the shapes tell, and the share of
    tensors, of the file's and its own, that the two have in common."""
    # The last vector is the classifier's bias in every published file.
    vectors = [value for value in state.values() if value.dim() == 1]
    try:
        options = MODELS.builder(name).options_of(state)
        with torch.device("meta"):
            model = create_model(name, len(vectors[-1]), **options)
        theirs = without_computed(model.convert_state_dict(dict(state)))
    except (ValueError, TypeError, RuntimeError, LookupError):  # something else altogether
        return name, 0.0
    ours = without_computed(model.state_dict())
    common = [key for key in ours.keys() & theirs.keys() if ours[key].shape == theirs[key].shape]
    spec, defaults = [name], MODELS.defaults(name)
    for key, value in options.items():
        if value != defaults.get(key):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            spec.append(f"{key}={text}")
    return " ".join(spec), len(common) / len(ours.keys() | theirs.keys())
