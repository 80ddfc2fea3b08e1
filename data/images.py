"""One image: which files are images, how a file is read, and how it becomes RGB.

Everywhere the same, in training, evaluation and prediction:
- what a file holds is told by its content, not by its ending;
- of an animation or a file of many pages, the first one;
- colours are converted as Pillow does (palette, CMYK, grey, ...), and transparency is dropped, not
  laid on a ground, as torchvision and timm do;
- grey values of 16 bits are scaled to 8, which Pillow would clip to white; 32-bit integers and
  floats, whose range no file tells, are unreadable;
- EXIF's note that a camera was turned is not followed, as in torchvision and timm. (TIFF and AVIF,
  whose formats say themselves how an image lies, are turned by their decoders.)
"""
import errno
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.log import print_from_any
from utils.registry import one_line

Result = TypeVar("Result")

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm",
              ".tif", ".tiff", ".webp", ".gif", ".avif", ".jp2")
# What systems, file servers and tools leave behind, beside names that begin with a dot.
JUNK = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "lost+found", "@eadir",
        "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin",
        "recycler", "system volume information", "network trash folder", "temporary items",
        "__pycache__"}

WAITS = (0.1, 0.5, 2.0)  # seconds before a read is tried again
# Faults of a name or of rights, which no waiting mends. All others of a disk or a network may pass.
LASTING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP,
           errno.ENAMETOOLONG, errno.EINVAL}
HUGE, MOST_PER_BYTE = 2 ** 25, 1000  # pixels; blank grey ones make 1,000 of a PNG's bytes
TIFF_BITS, TIFF_GREY = 258, 262  # tags: bits per sample; 0 where the greatest value is black


class Unreadable(OSError):
    """An image that cannot be read. The message says why, without its name."""


class StorageFault(Unreadable):
    """Not the file: what it lies on failed, as often as it was tried."""


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not is_junk(name)


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name was left by a system or a tool."""
    return name.startswith((".", "~$")) or name.lower() in JUNK


def printable(text: str) -> str:
    """A name whose bytes are no UTF-8, with these as \\udc.. ; any other name unchanged."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# Reading


def read_image(path: str) -> Image.Image:
    """The image in a file, not yet decoded; no file stays open. Raises Unreadable."""
    try:
        content = persistently(read_bytes, path)
    except OSError as error:
        kind = StorageFault if may_pass(error, path) else Unreadable
        raise kind(error.strerror or one_line(error)) from None
    return open_image(content)


def open_image(content: bytes) -> Image.Image:
    """The image that a file holds, not yet decoded. Raises Unreadable."""
    if not content:
        raise Unreadable("the file is empty")
    with decoding():
        image = Image.open(io.BytesIO(content))
    if image.format == "EPS":
        raise Unreadable("it is PostScript, a program; save it as an image")
    num_pixels = image.width * image.height
    if num_pixels > HUGE and num_pixels > MOST_PER_BYTE * len(content):
        raise Unreadable(f"it says that it has {image.width} x {image.height} pixels, and has "
                         f"{len(content):,} bytes: it is blank, damaged, or made to fill a memory")
    return image


def read_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def persistently(act: Callable[[str], Result], path: str) -> Result:
    """act(path), tried again after growing waits where a fault of the storage may pass."""
    for wait in WAITS:
        try:
            return act(path)
        except OSError as error:
            if not may_pass(error, path):
                raise
            print_from_any(f"{printable(path)}: {error.strerror or one_line(error)}; trying again "
                           f"in {wait:g} s")
        time.sleep(wait)
    return act(path)


def may_pass(error: OSError, path: str) -> bool:
    """A file that is not there may come back where its folder is gone, too: a lost mount."""
    if error.errno == errno.ENOENT:
        return not os.path.isdir(os.path.dirname(path) or ".")
    return error.errno not in LASTING


@contextmanager
def decoding() -> Iterator[None]:
    """Whatever a decoder raises becomes Unreadable: theirs come from many authors, and a damaged
    file takes them where they did not expect to be."""
    try:
        yield
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable("it is no image of a kind that Pillow can read") from None
    except Exception as error:
        raise Unreadable(one_line(error)) from error


# Decoding


def to_rgb(image: Image.Image) -> Image.Image:
    """The image decoded, in RGB. Raises Unreadable for a file that is damaged, or of a kind that
    has no meaning in 8 bits."""
    with decoding():
        image.load()
        if image.mode == "RGB":
            return image
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return Image.fromarray(scaled_to_bytes(image)).convert("RGB")
        if image.mode in ("LA", "PA", "RGBA") or (
                image.mode == "P" and "transparency" in image.info):
            return without_transparency(image)
        return image.convert("RGB")


def scaled_to_bytes(image: Image.Image) -> np.ndarray:
    """(H, W) uint8 of grey values of more than 8 bits."""
    tags = getattr(image, "tag_v2", {})  # TIFF's
    # Before Pillow 10.3, PNG's 16 bits come in 32.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "32-bit floats" if image.mode == "F" else "integers of 32 bits, or with a sign"
        raise Unreadable(f"its values are {kind}, and nothing says which is white; save it with 8 "
                         "or 16 bits")
    white = 2 ** tags.get(TIFF_BITS, (16,))[0] - 1  # 12 bits, too
    levels = ((np.arange(2 ** 16) * 255 + white // 2) // white).clip(0, 255).astype(np.uint8)
    if tags.get(TIFF_GREY) == 0:
        levels = 255 - levels
    values = np.asarray(image)
    scaled = np.empty(values.shape, np.uint8)
    for row, line in enumerate(values):  # as a whole, it would be copied with 64 bits
        levels.take(line, out=scaled[row], mode="clip")
    return scaled


def without_transparency(image: Image.Image) -> Image.Image:
    """Its colours. Raises Unreadable where these are one colour only and all that is drawn lies in
    the transparency, as in icons."""
    image = image.convert("RGBA")  # first, as Pillow warns of palettes otherwise
    *colours, transparency = image.getextrema()
    if transparency[0] < transparency[1] and all(low == high for low, high in colours):
        raise Unreadable("it is of one colour, and what is drawn is in its transparency only; save "
                         "it on a ground")
    return image.convert("RGB")
