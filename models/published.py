"""Where weights come from: the known addresses, and files fetched once per machine."""
import hashlib
import urllib.error
import urllib.parse
from pathlib import Path
from typing import NamedTuple

import torch

from utils.checkpoint import load_file
from utils.log import markdown_table
from utils.registry import UserError

_SURF = "https://surfdrive.surf.nl/files/index.php/s/{}/download"
_DRIVE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"
_META = "https://dl.fbaipublicfiles.com/convnext/convnext_{}_1k_224_ema.pth"
_DEIT = "https://dl.fbaipublicfiles.com/deit/deit_{}.pth"
_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/{}.pth"
_TORCHVISION = "https://download.pytorch.org/models/{}.pth"
# Files whose names end in the start of their sha256 begin like this.
_HASHED = tuple(address.partition("{")[0] for address in (_TORCHVISION, _DEIT))


class Published(NamedTuple):
    """Weights and how their publisher evaluated them: the short side to `resize`, the centre cut
    out. Torchvision's values are those of its weights' `transforms`, timm's of its `default_cfg`
    for this file; DeiT, ConvNeXt and what came from its code divide the size by 0.875."""

    url: str
    top1: float | None  # ImageNet-1K, as its publisher states it; None: it does not
    size: int = 224  # pixels, as is resize
    resize: int = 256
    interpolation: str = "bicubic"

    def is_named(self, source: str) -> bool:
        """Whether `source`, as a flag has it, is this file."""
        return source in ("published", self.url) or Path(source).name == _file_name(self.url)


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
    "resnet18": Published(_TORCHVISION.format("resnet18-f37072fd"), 69.758, 224, 256,
                          "bilinear"),
    "resnet34": Published(_TORCHVISION.format("resnet34-b627a593"), 73.314, 224, 256,
                          "bilinear"),
    "resnet50": Published(_TORCHVISION.format("resnet50-11ad3fa6"), 80.858, 224, 232,
                          "bilinear"),
    "resnet101": Published(_TORCHVISION.format("resnet101-cd907fc2"), 81.886, 224, 232,
                           "bilinear"),
    "swin_t": Published(_TORCHVISION.format("swin_t-704ceda3"), 81.474, 224, 232),
    "mobilenetv3_l": Published(_TORCHVISION.format("mobilenet_v3_large-5c1a4163"), 75.274, 224,
                               232, "bilinear"),
    "efficientnet_b3": Published(_TORCHVISION.format("efficientnet_b3_rwightman-b3899882"), 82.008,
                                 300, 320),
    "deit_s": Published(_DEIT.format("small_patch16_224-cd65a155"), 79.854),
    "resnet50d": Published(_TIMM.format("v0.1-weights/resnet50d_ra2-464e36ba"), 80.55),
    "vit_s": Published(_TIMM.format("v0.1-weights/vit_small_p16_224-15ec54c9"), None, 224, 248),
    "vit_b": Published(_TIMM.format("v0.1-vitjx/jx_vit_base_p16_224-80ecf9dd"), 81.78, 224, 248),
}


def published_source(model_name: str) -> str:
    """The address of the published weights of a registered model."""
    if model_name not in PUBLISHED:
        raise UserError(f"no published weights are known for {model_name!r} (known: "
                        f"{', '.join(PUBLISHED)}). Pass a file or an address, or the word random.")
    return PUBLISHED[model_name].url


def published_table() -> str:
    """A Markdown table of the known addresses."""
    rows = [(name, known.url, str(known.top1 or "not stated"), str(known.size),
             f"{known.resize}, {known.interpolation}") for name, known in PUBLISHED.items()]
    return markdown_table(("name", "address", "top-1 %", "px", "resized to"), rows, 2)


def local_file(source: str | Path) -> Path:
    """`source` itself when it is a path; an address is downloaded once into torch.hub's cache."""
    if not str(source).startswith(("http://", "https://")):
        return Path(source)
    url = str(source)
    name = _file_name(url)
    if url not in {published.url for published in PUBLISHED.values()}:
        # Two runs' checkpoint-best.pth are two files.
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        _download(url, path)
    return path


def _file_name(url: str) -> str:
    """Of what the address gives."""
    parts = urllib.parse.urlparse(url)
    if Path(parts.path).name != "download":
        return Path(parts.path).name
    # A share's address; its token names the file.
    query = urllib.parse.parse_qs(parts.query)
    return (query.get("id") or [Path(parts.path).parts[-2]])[0] + ".pth"


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
