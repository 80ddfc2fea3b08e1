"""Outlines: ten shapes drawn only by dots far apart along their outline.

Number, spacing, radius and colour of the dots are drawn before the class is looked at, and every
outline is scaled to the same range of perimeters, so a single dot or a pixel count says nothing
about the class: the arrangement decides. A few neighbouring dots do say something (straight or
bent, and which way), so a network of small reach is behind, not blind; and small kernels reach
everything when there are enough stages with strides. Nothing is downloaded or stored; an image is a
pure function of (seed, split, index).
"""
import numpy as np
from PIL import Image

from data.datasets import ImageSource, register_dataset
from utils.registry import UserError

SPLITS = ("train", "val")

# All lengths are pixels of a 64-pixel image; other sizes scale them.
REFERENCE_SIZE = 64
PERIMETER = (115.0, 155.0)
SPACING = (9.5, 12.0)  # between neighbouring dots along the outline
RADIUS = (1.3, 1.9)  # one per image
JITTER = 0.5  # standard deviation of a dot's place around the outline
MARGIN = 3.0  # no dot's centre is nearer to the border
NUM_DISTRACTORS = (5, 9)  # dots anywhere, both ends included
TURN = np.pi / 9  # an outline is turned by up to this angle, either way, and mirrored half the time
STRETCH = 0.1  # one axis is longer by up to this share, the other shorter
GROUND, COLOUR = (0, 80), (160, 255)  # grey levels, drawn for each channel
NOISE = 12  # the noise on everything is uniform in +-NOISE grey levels

POINTS_PER_OUTLINE = 512


def _closed(corners: list[tuple[float, float]]) -> np.ndarray:
    return np.array([*corners, corners[0]], dtype=float)


def _polar(radius, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _regular(num_corners: int, inner: float | None = None) -> np.ndarray:
    """Regular polygon, or a star whose inner corners lie on a circle of radius `inner`."""
    count = num_corners if inner is None else 2 * num_corners
    radius = np.ones(count + 1)
    if inner is not None:
        radius[1::2] = inner
    return _polar(radius, np.linspace(0, 2 * np.pi, count + 1))


def _crescent() -> np.ndarray:
    """A half circle and, back along it, a flatter arc through the same two tips."""
    outer = _polar(1.0, np.linspace(-0.65 * np.pi, 0.65 * np.pi, 200))
    tip_x, tip_y = outer[-1]
    back = np.linspace(1, -1, 200)
    inner = np.stack([tip_x + 0.75 * (1 - back ** 2), tip_y * back], axis=1)
    return np.concatenate([outer, inner])


def _heart() -> np.ndarray:
    """The usual parametric heart, see Weisstein, "Heart Curve", MathWorld."""
    t = np.linspace(0, 2 * np.pi, 400)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, y], axis=1)


def _outlines() -> dict[str, np.ndarray]:
    turn = np.linspace(0, 2 * np.pi, 400)
    return {
        "circle": _polar(1.0, turn),
        "ellipse": _polar(1.0, turn) * (2.2, 1.0),
        "triangle": _regular(3),
        "square": _regular(4),
        "bar": _closed([(0, 0), (2.6, 0), (2.6, 1), (0, 1)]),
        "cross": _closed([(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2),
                          (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]),
        "star": _regular(5, inner=0.45),
        "ell": _closed([(0, 0), (3, 0), (3, 1), (1, 1), (1, 3), (0, 3)]),
        "crescent": _crescent(),
        "heart": _heart(),
    }


def _unit_perimeter(curve: np.ndarray) -> np.ndarray:
    """(POINTS_PER_OUTLINE, 2) places at equal steps along `curve`, its perimeter scaled to 1 and
    its middle (of the bounding box) moved to the origin."""
    steps = np.linalg.norm(np.diff(curve, axis=0), axis=1)
    length = np.concatenate([[0], np.cumsum(steps)])
    at = np.arange(POINTS_PER_OUTLINE) / POINTS_PER_OUTLINE * length[-1]
    points = np.stack([np.interp(at, length, curve[:, axis]) for axis in (0, 1)], axis=1)
    return (points - (points.max(0) + points.min(0)) / 2) / length[-1]


class Outlines(ImageSource):
    classes = list(_outlines())

    def __init__(self, split: str, size: int, seed: int = 0, image_size: int = 64) -> None:
        if split not in SPLITS:
            raise UserError(f"outlines has the splits {' and '.join(SPLITS)}; got {split!r}.")
        for name, value, least in (("size", size, 1), ("seed", seed, 0),
                                   ("image_size", image_size, 32)):
            if not isinstance(value, (int, np.integer)) or value < least:
                raise UserError(f"outlines takes a whole number of at least {least} as {name}; "
                                f"got {value!r}.")
        self.split, self.size, self.seed, self.image_size = split, size, seed, image_size
        self.curves = [_unit_perimeter(curve) for curve in _outlines().values()]

    def __len__(self) -> int:
        return self.size

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The RGB image and its label, `index % 10`. IndexError outside 0..size-1."""
        if not 0 <= index < self.size:
            raise IndexError(f"outlines has samples 0 to {self.size - 1}; got {index}.")
        label = index % len(self.classes)
        rng = np.random.Generator(np.random.PCG64(
            np.random.SeedSequence([self.seed, SPLITS.index(self.split), index])))
        scale = self.image_size / REFERENCE_SIZE
        dots = self._place_dots(rng, self.curves[label]) * scale
        radius = rng.uniform(*RADIUS) * scale
        return Image.fromarray(_paint(rng, dots, radius, self.image_size)), label

    def label(self, index: int) -> int:
        return index % len(self.classes)

    def name_of(self, index: int) -> str:
        return f"outlines {self.split} sample {index} (seed {self.seed})"

    def _place_dots(self, rng: np.random.Generator, curve: np.ndarray) -> np.ndarray:
        """(D, 2) centres in a 64-pixel image: dots along the outline, then distractors."""
        perimeter, spacing = rng.uniform(*PERIMETER), rng.uniform(*SPACING)
        num_dots = round(perimeter / spacing)
        at = (np.arange(num_dots) / num_dots + rng.random()) % 1
        dots = perimeter * curve[(at * POINTS_PER_OUTLINE).astype(int)]
        stretch = 1 + STRETCH * rng.uniform(-1, 1)
        mirror = rng.choice((-1, 1))
        dots = dots * (mirror * stretch, 1 / stretch) @ _rotation(rng.uniform(-TURN, TURN))
        dots += rng.normal(0, JITTER, dots.shape)
        # A long outline turned to the diagonal of its box may not fit; shrink it until it does.
        dots *= min(1.0, (REFERENCE_SIZE - 2 * MARGIN) / np.ptp(dots, axis=0).max())
        low, high = MARGIN - dots.min(0), REFERENCE_SIZE - MARGIN - dots.max(0)
        dots += low + (high - low) * rng.random(2)
        num_distractors = rng.integers(*NUM_DISTRACTORS, endpoint=True)
        distractors = rng.uniform(MARGIN, REFERENCE_SIZE - MARGIN, (num_distractors, 2))
        return np.concatenate([dots, distractors])


@register_dataset("outlines")
def outlines(part: str, data_path: str | None, train_size: int = 10_000, val_size: int = 2_000,
             seed: int = 0, image_size: int = 64) -> Outlines:
    if data_path is not None:
        raise UserError(f"--data-set outlines draws its images itself; leave out --data-path "
                        f"{data_path}.")
    return Outlines(part, train_size if part == "train" else val_size, seed, image_size)


def _rotation(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def _paint(rng: np.random.Generator, dots: np.ndarray, radius: float, size: int) -> np.ndarray:
    """(size, size, 3) uint8: anti-aliased discs of one colour on a noisy darker ground."""
    reach = int(np.ceil(radius + 0.5))
    window = np.arange(-reach, reach + 1)
    middle = np.floor(dots).astype(int)
    pixels = np.clip(middle[:, :, None] + window, 0, size - 1)  # (D, 2, 2 reach + 1)
    offset = pixels + 0.5 - dots[:, :, None]
    distance = np.hypot(offset[:, 0, None, :], offset[:, 1, :, None])
    cover = np.zeros((size, size), dtype=np.float32)
    np.maximum.at(cover, (pixels[:, 1, :, None], pixels[:, 0, None, :]),
                  np.clip(radius + 0.5 - distance, 0, 1))
    ground, colour = rng.uniform(*GROUND, 3), rng.uniform(*COLOUR, 3)
    noise = np.frombuffer(rng.bytes(size * size * 3), np.uint8).reshape(size, size, 3)
    image = ground.astype(np.float32) + cover[:, :, None] * (colour - ground).astype(np.float32)
    image += noise * np.float32(2 * NOISE / 255) - np.float32(NOISE)
    return np.clip(image, 0, 255).astype(np.uint8)
