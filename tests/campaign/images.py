"""Images in every format that Pillow writes and every mode that it takes, whole and damaged, in
folders of a dozen: read or named, never a crash."""
import io
import random
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from tests.campaign.base import TINY, damage, draw
from tests.campaign.process import Result, judge, run

Image.init()
FORMATS = sorted(Image.SAVE)
MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB",
         "HSV", "I", "F", "I;16", "I;16B"]
SUFFIXES = [".jpg", ".JPEG", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"]
NUMBER = 12  # images of one attack
OURS = "--checkpoint ../base/run/checkpoint-last.pth --num-workers 0 --device cpu "
USES = {  # whether a damaged image may be refused, and how the images are used
    "eval": (True, "eval", (OURS + "--data-path images --predictions out.npz").split()),
    "skip": (False, "eval", (OURS + "--data-path images --skip-bad-images").split()),
    "train": (False, "train_kd", [*TINY, "--data-path", "images", "--epochs", "1",
                                  "--skip-bad-images", "--output-dir", "new"]),
    "predict": (False, "predict", (OURS + "images/val --csv out.csv").split()),
}


def images(rng: random.Random, folder: Path, base: Path) -> Result:
    use, labels = rng.choice(list(USES)), []
    for name in "abc":  # some healthy ones
        shutil.copytree(base / "images" / "train" / name, folder / "images" / "train" / name)
        (folder / "images" / "val" / name).mkdir(parents=True)
        shutil.copy(base / "images" / "val" / name / "0.png", folder / "images" / "val" / name)
    for i in range(NUMBER):
        content, label = encode(rng)
        if rng.random() < 0.7:
            content, kind = damage(content, rng)
            label += f" {kind}"
        labels.append(label)
        split = rng.choice(["train", "val"]) if use == "train" else "val"
        file = f"{i + 10}{rng.choice(SUFFIXES)}"
        (folder / "images" / split / "abc"[i % 3] / file).write_bytes(content)
    may_refuse, program, argv = USES[use]
    result = judge(run(program, argv, folder), f"{use}: {'; '.join(labels)}"[:600], NUMBER)
    if result.refused and not may_refuse:
        return Result(fault="stopped although bad images are left out", label=result.label)
    return result


def encode(rng: random.Random) -> tuple[bytes, str]:
    """A drawn image as a file of a random format, mode and kind."""
    while True:
        name, mode, size = rng.choice(FORMATS), rng.choice(MODES), rng.choice([1, 2, 17, 40, 300])
        file, options = io.BytesIO(), rng.choice([{}, {}, {}, options_of(rng)])
        image = draw(rng.randrange(3), rng.randrange(99), size)
        try:
            in_mode(image, mode).save(file, name, **options)
        except Exception:  # this format does not take this mode, each in its own words
            continue
        if file.getvalue():
            return file.getvalue(), f"{name} {mode} {size} {'+'.join(options)}"


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode.startswith("I;16"):
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).convert(mode)
    if mode in ("La", "RGBa"):
        return image.convert(mode.upper()).convert(mode)
    if mode in ("LAB", "PA"):
        plain = image.convert({"LAB": "RGB", "PA": "LA"}[mode])
        return Image.frombytes(mode, image.size, plain.tobytes())
    return image.convert(mode)


def options_of(rng: random.Random) -> dict:
    """Options that make a file of another kind."""
    exif = Image.Exif()
    exif[0x0112] = rng.choice([0, 1, 3, 6, 8, 9, 65535])
    more = [draw(0, 1, size) for size in (9, 40)]
    return rng.choice([
        {"exif": exif}, {"exif": b"Exif\0\0damaged"}, {"save_all": True, "append_images": more},
        {"compression": rng.choice(["tiff_lzw", "tiff_deflate", "group4", "jpeg", "packbits"])},
        {"quality": rng.choice([0, 1, 100])}, {"lossless": True}, {"icc_profile": b"no profile"},
        {"transparency": 0}, {"progressive": True}, {"optimize": True}, {"dpi": (0, 0)}])
