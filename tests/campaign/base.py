"""What the attacks start from, and what a bad disk makes of a file."""
import random
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from tests.campaign.process import run

# Words of a run of a second or two: 24 images, 3 updates an epoch, in a folder beside `base`.
TINY = ("--device cpu --num-workers 0 --data-path ../base/images --input-size 32 --batch-size 8 "
        "--effective-batch 8 --warmup-epochs 1 --lr 1e-3 --student resnet_nano").split()
TWO_EPOCHS = [*TINY, "--epochs", "2", "--model-ema", "--model-ema-decay", "0.5", "--save-freq", "1",
              "--save-best", "full"]


def build(base: Path) -> None:
    """`images`, a data set; `run`, a finished run of two epochs; `half`, its folder after one."""
    for split, number in (("train", 8), ("val", 4)):
        for label in range(3):
            folder = base / "images" / split / "abc"[label]
            folder.mkdir(parents=True)
            for i in range(number):
                draw(label, i + 100 * (split == "val")).save(folder / f"{i}.png")
    case, half = base.parent / "case", base / "half"
    case.mkdir()
    half.mkdir()
    ended = run("train_kd", [*TWO_EPOCHS, "--output-dir", "run"], case)
    assert ended.code == 0, ended.output
    shutil.move(case / "run", base / "run")
    for name in ("last", "0", "best", "best-ema"):  # the first epoch is always the best so far
        shutil.copy(base / "run" / "checkpoint-0.pth", half / f"checkpoint-{name}.pth")
    shutil.copy(base / "run" / "args.yaml", half)
    first = (base / "run" / "log.txt").read_text().splitlines()[0]
    (half / "log.txt").write_text(first + "\n")


def draw(label: int, seed: int, size: int = 40) -> Image.Image:
    """An RGB image of waves, whose number says the class."""
    rng = np.random.default_rng([label, seed])
    y, x = np.mgrid[:size, :size]
    wave = 127 + 90 * np.sin((x * (label + 1) + y * (label % 3)) / 5 + 6 * rng.random())
    noise = rng.normal(0, 20, (size, size, 3))
    return Image.fromarray((wave[..., None] + noise).clip(0, 255).astype("uint8"))


def damage(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Other bytes, never the same, and what was done to them."""
    while True:
        changed, size = bytearray(content), len(content)
        kind = rng.choice(["bit", "bit", "zeros", "truncated", "noise", "twice", "cut"])
        at = rng.choice([rng.randrange(size), rng.randrange(min(200, size)),  # anywhere, the head,
                         size - 1 - rng.randrange(min(4000, size))])  # an archive's list of parts
        length = rng.choice([1, 4, 64, 512, 4096])
        if kind == "bit":
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "zeros":  # a block of a disk, or of a small file a part
            length = min(4096, size // 16 + 1)
            start = at // length * length
            changed[start:start + length] = bytes(len(changed[start:start + length]))
        elif kind == "truncated":
            changed = changed[:rng.choice([0, 1, at, at])]
        elif kind == "noise":
            changed[at:at + length] = rng.randbytes(len(changed[at:at + length]))
        elif kind == "twice":
            changed = changed[:at + length] + changed[at:]
        else:
            changed = changed[:at] + changed[at + length:]
        if changed != content:
            return bytes(changed), kind
