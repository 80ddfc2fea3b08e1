"""One image: which files are, how they are read, what becomes RGB, and what is unreadable."""
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import images
from data.images import (
    StorageFault,
    Unreadable,
    is_image,
    open_image,
    printable,
    read_image,
    to_rgb,
)
from data.loader import Samples
from tests.test_data import AS_IT_IS, big_jpeg
from utils.registry import UserError

RAMP = np.linspace(0, 255, 24 * 20 * 3).reshape(24, 20, 3).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(content: bytes) -> np.ndarray:
    image = to_rgb(open_image(content))
    assert image.mode == "RGB"
    return np.asarray(image)


def in_mode(mode: str) -> Image.Image:
    image = Image.fromarray(RAMP)
    if mode == "RGBA":
        image.putalpha(128)
        return image
    return image.convert("L").convert("LA") if mode == "LA" else image.convert(mode)


# What becomes RGB


@pytest.mark.parametrize("mode, kind", [
    ("L", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("RGBA", "PNG"), ("P", "PNG"),
    ("P", "GIF"), ("1", "BMP"), ("LA", "PNG"), ("RGB", "JPEG"), ("RGB", "WEBP"), ("RGB", "PNG"),
    ("YCbCr", "TIFF"), ("RGBA", "WEBP"), ("RGB", "JPEG2000"), ("RGBA", "TIFF")])
def test_colours_are_those_of_pillow(mode, kind):
    """The pixels of the plain conversion, bit for bit."""
    content = saved(in_mode(mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    got = pixels_of(content)
    np.testing.assert_array_equal(got, expected)
    lossy = kind in ("JPEG", "WEBP", "JPEG2000") or mode in ("CMYK", "YCbCr", "1", "P")
    difference = np.abs(got.astype(int) - np.asarray(in_mode(mode).convert("RGB"))).mean()
    assert difference < (12 if lossy else 0.01)
    image = Image.open(io.BytesIO(content))
    assert data.eval_transform(32)(image).shape == (3, 32, 32)
    for is_fast in (False, True):
        transform = data.train_transform(40, fast_decode=is_fast)
        assert transform(Image.open(io.BytesIO(content))).shape == (3, 40, 40)


def sixteen_bits(kind: str) -> bytes:
    return saved(Image.fromarray(RAMP[..., 0].astype(np.uint16) * 257), kind)


def big_endian_tiff() -> bytes:
    """Saved as Pillow's I;16B."""
    values = (RAMP[..., 0].astype(np.uint16) * 257).astype(">u2")
    return saved(Image.frombytes("I;16B", (20, 24), values.tobytes()), "TIFF")


def grey_map(white: int) -> bytes:
    values = np.round(RAMP[..., 0].astype(float) * white / 255).astype(">u2")
    return b"P5 20 24 %d\n" % white + values.tobytes()


@pytest.mark.parametrize("content", [
    sixteen_bits("PNG"), sixteen_bits("TIFF"), big_endian_tiff(), grey_map(65535),
    sixteen_bits("JPEG2000")], ids=["PNG", "TIFF", "TIFF MM", "PGM", "JPEG2000"])
def test_sixteen_bits_keep_their_grey(content):
    np.testing.assert_array_equal(pixels_of(content), RAMP[..., :1].repeat(3, axis=2))


def test_bits_between_keep_their_grey():
    """A grey map of 10 bits; and a TIFF of 12, whose values its decoder does not scale."""
    gap = np.abs(pixels_of(grey_map(1023))[..., 0].astype(int) - RAMP[..., 0])
    assert gap.max() <= 1
    image = open_image(sixteen_bits("TIFF"))
    image.load()
    image.tag_v2[images.TIFF_BITS] = (12,)
    image.putdata(np.round(RAMP[..., 0].astype(float) * 4095 / 255).astype(int).ravel().tolist())
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[..., 0], RAMP[..., 0])
    image.tag_v2[images.TIFF_GREY] = 0  # white is zero
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[..., 0], 255 - RAMP[..., 0])


def test_of_an_animation_the_first_image_counts():
    frames = [Image.fromarray(np.roll(RAMP, 5 * number, axis=0)) for number in range(3)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {} if kind == "TIFF" else {"duration": 40}
        options |= {"lossless": True} if kind == "WEBP" else {}
        content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        still = saved(frames[0], kind, **({"lossless": True} if kind == "WEBP" else {}))
        np.testing.assert_array_equal(pixels_of(content), pixels_of(still), err_msg=kind)


def test_transparency_is_dropped():
    image = Image.fromarray(RAMP)
    image.putalpha(Image.fromarray(RAMP[::-1, :, 0].copy()))
    np.testing.assert_array_equal(pixels_of(saved(image, "PNG")), RAMP)
    palette = Image.fromarray(RAMP).convert("P")
    content = saved(palette, "PNG", transparency=bytes(range(256)))
    np.testing.assert_array_equal(pixels_of(content), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_turns_nothing(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = (saved(Image.fromarray(RAMP), kind, **options)
                     for options in ({}, {"exif": exif}))
    assert Image.open(io.BytesIO(turned)).getexif()[0x0112] == 6
    np.testing.assert_array_equal(pixels_of(turned), pixels_of(plain))


# What is unreadable


def icon() -> bytes:
    image = Image.new("RGBA", (20, 24))
    image.putalpha(Image.fromarray(RAMP[..., 0]))
    return saved(image, "PNG")


def bomb() -> bytes:
    """A grey map that says it has 40,000 x 40,000 pixels."""
    return b"P5 40000 40000 255\n" + bytes(64)


UNREADABLE = {
    "empty": (b"", "the file is empty"),
    "text": (b"Not Found\n", "no image of a kind that Pillow can read"),
    "truncated": (saved(Image.fromarray(RAMP), "JPEG")[:-40], "truncated"),
    "floats": (saved(Image.fromarray(RAMP[..., 0].astype(np.float32)), "TIFF"), "32-bit floats"),
    "integers": (saved(Image.fromarray(RAMP[..., 0].astype(np.int32)), "TIFF"), "of 32 bits"),
    "transparency alone": (icon(), "in its transparency only"),
    "PostScript": (saved(Image.fromarray(RAMP), "EPS"), "PostScript"),
    "bomb": (bomb(), "1600000000 pixels"),
    "nothing, but much of it": (saved(Image.new("1", (6000, 6000)), "TIFF", compression="group4"),
                                "6000 x 6000 pixels"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_the_reason_is_said(case, tmp_path):
    content, telling = UNREADABLE[case]
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(Unreadable) as error:
        to_rgb(read_image(str(tmp_path / "x.png")))
    assert telling in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("raised", [RuntimeError("avif"), SystemError(), MemoryError(),
                                    ZeroDivisionError("x"), KeyError(3), SyntaxError("png")])
def test_whatever_a_decoder_raises_is_unreadable(raised, monkeypatch):
    def load(self) -> None:
        raise raised

    content = saved(Image.fromarray(RAMP), "PNG")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(Unreadable) as error:
        to_rgb(open_image(content))
    assert str(error.value)
    monkeypatch.setattr(Image, "open", lambda file: load(None))
    with pytest.raises(Unreadable):
        open_image(content)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the damage
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF", "AVIF",
                                  "JPEG2000", "SPIDER", "SGI", "TGA", "ICO", "DDS", "QOI"])
def test_a_damaged_file_is_unreadable_or_an_image(kind):
    image = Image.fromarray(RAMP).convert("F" if kind == "SPIDER" else "RGB")
    try:
        whole = saved(image, kind)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow writes no {kind}")
    rng, num_bad = np.random.default_rng(0), 0
    for _ in range(60):
        content = np.frombuffer(whole, np.uint8)[:rng.integers(1, len(whole) + 1)].copy()
        content[rng.integers(0, len(content), 4)] ^= rng.integers(1, 256, 4).astype(np.uint8)
        try:
            to_rgb(open_image(content.tobytes()))
        except Unreadable:
            num_bad += 1
    assert num_bad > 10


@pytest.mark.parametrize("is_fast", [False, True])
def test_a_truncated_jpeg_is_not_half_an_image(is_fast, tmp_path):
    """Even at a scale at which what is there would do: the next image stands in for it."""
    for name in ("a.jpg", "b.jpg"):
        big_jpeg(tmp_path / "train" / "ant" / name)
    path = tmp_path / "train" / "ant" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-2000])
    source = data.create_dataset("imagefolder", "train", str(tmp_path))
    transform = data.train_transform(40, fast_decode=is_fast)
    samples = Samples(source, transform, seed=0)
    assert samples[0, 0].index == 0 and not samples[0, 0].readable
    loader = data.eval_loader(source, transform, batch_size=2, num_workers=0)
    with pytest.raises(UserError, match=r"a.jpg \(image file is truncated.*--skip-bad-images"):
        list(loader)


# Faults that pass


class Storage:
    """In place of the reading: fails so often, then reads."""

    def __init__(self, monkeypatch, number: int, code: int = errno.EIO) -> None:
        self.left, self.code, self.read, self.slept = number, code, images.read_bytes, []
        monkeypatch.setattr(images, "read_bytes", self)
        monkeypatch.setattr(images.time, "sleep", self.slept.append)

    def __call__(self, path: str) -> bytes:
        self.left -= 1
        if self.left >= 0:
            raise OSError(self.code, os.strerror(self.code), path)
        return self.read(path)


@pytest.fixture
def ants(tmp_path) -> data.ImageSource:
    for number in range(4):
        path = tmp_path / "val" / "ant" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RAMP + np.uint8(number)).save(path)
    return data.create_dataset("imagefolder", "val", str(tmp_path))


def test_a_read_is_tried_again_three_times(ants, monkeypatch, capsys):
    storage = Storage(monkeypatch, 3)
    np.testing.assert_array_equal(np.asarray(to_rgb(ants.load(0)[0])), RAMP)
    assert storage.slept == [0.1, 0.5, 2.0]
    assert capsys.readouterr().err.count("0.png: Input/output error; trying again in") == 3
    Storage(monkeypatch, 4)
    with pytest.raises(StorageFault, match="^Input/output error$"):
        ants.load(0)


@pytest.mark.parametrize("make, telling", [
    (Path.unlink, "No such file"), (lambda path: (path.unlink(), path.mkdir()), "Is a directory")])
def test_what_does_not_pass_is_not_waited_for(make: Callable, telling, ants, monkeypatch):
    storage = Storage(monkeypatch, 0)
    make(Path(ants.path_of(0)))
    with pytest.raises(Unreadable, match=telling) as error:
        ants.load(0)
    assert not storage.slept and not isinstance(error.value, StorageFault)


def test_a_mount_that_is_gone_may_come_back(ants, monkeypatch):
    storage, folder = Storage(monkeypatch, 0), Path(ants.path_of(0)).parent
    away = folder.rename(folder.with_name("away"))
    monkeypatch.setattr(images.time, "sleep", lambda seconds: away.rename(folder))
    assert np.asarray(to_rgb(ants.load(0)[0])).shape == RAMP.shape and storage.left == -2


def test_what_passes_only_after_all_tries_is_in_its_place_again(ants, monkeypatch, capsys):
    """It counts as unreadable where it is loaded, and is read when it would be reported."""
    expected = list(data.eval_loader(ants, AS_IT_IS, batch_size=4, num_workers=0))
    Storage(monkeypatch, 4)
    batches = list(data.eval_loader(ants, AS_IT_IS, batch_size=4, num_workers=0))
    assert bool(batches[0].readable.all())
    assert (batches[0].images.pixels == expected[0].images.pixels).all()
    assert "0.png could be read at a second try" in capsys.readouterr().err


@pytest.mark.parametrize("skips", [False, True])
def test_a_dead_disk_is_not_skipped(skips, ants, monkeypatch):
    storage = Storage(monkeypatch, 10 ** 6)
    loader = data.eval_loader(ants, AS_IT_IS, batch_size=4, num_workers=0, skip_bad_images=skips)
    with pytest.raises(UserError, match="3 images .*Input/output error.*disk or the network"):
        list(loader)
    assert len(storage.slept) == 9


# Names


@pytest.mark.parametrize("name, is_one", [
    ("a.jpg", True), ("a.JPEG", True), ("a.jfif", True), ("a.gif", True), ("a.avif", True),
    ("._a.jpg", False), (".a.png", False), ("a.txt", False), ("Thumbs.db", False), ("jpg", False)])
def test_what_is_an_image_by_its_name(name, is_one):
    assert is_image(name) == is_one


def test_a_name_that_is_no_text_can_be_printed():
    assert printable("caf\u00e9") == "caf\u00e9"
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\udce9"
