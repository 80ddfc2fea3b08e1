"""Effective receptive fields: known answers, the published values, and the command."""
import csv
import io
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import models
from analysis import common
from analysis.common import LoadedModel, Selection, select
from analysis.erf import (
    THRESHOLDS,
    Field,
    contributions,
    controls,
    draw,
    extents,
    main,
    measure,
    report,
    table_rows,
)
from models.base import FeatureInfo, ModelOutput, VisionModel
from tests.helpers import fill_by_name, micro_slak
from utils.rng import fold_seed


class OneConv(VisionModel):
    """A single k x k convolution with weights of 1: it sees k x k pixels, all of them alike."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.feature_info, self.num_classes = (FeatureInfo(2, 1),), 2
        self.conv = nn.Conv2d(3, 2, kernel_size, padding=kernel_size // 2, bias=False)
        nn.init.ones_(self.conv.weight)

    def forward_with_features(self, images):
        feature = self.conv(images)
        return ModelOutput(feature.mean((2, 3)), [feature])


def images_of(number: int, size: int = 64) -> torch.Tensor:
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [64, 63])
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 31])
def test_a_single_convolution_has_the_side_of_its_kernel(kernel_size, size):
    field = measure(OneConv(kernel_size).eval(), [images_of(2, size)])
    for scale in ("log", "linear"):
        assert extents(field.contribution, scale)[-1].side == kernel_size
        assert {found[-1].side for found in field.per_image[scale]} == {kernel_size}
    area = kernel_size ** 2 / size ** 2
    assert extents(field.contribution)[-1].area == pytest.approx(area)


def test_the_published_map_and_sides(fixture_npz):
    known = fixture_npz("erf")
    model = fill_by_name(micro_slak()).eval()
    field = measure(model, torch.from_numpy(known["inputs"]).split(1))
    wanted = known["contribution"]
    np.testing.assert_allclose(field.contribution, wanted, rtol=1e-4, atol=1e-4 * wanted.max())
    assert [found.side for found in extents(wanted)] == known["sides"].tolist()
    assert [found.side for found in extents(field.contribution)] == known["sides"].tolist()
    assert THRESHOLDS == tuple(known["thresholds"])
    assert field.num_images == 3 and field.num_skipped == 0


def test_batches_of_one_and_of_eight_are_equal():
    model = fill_by_name(micro_slak()).eval()
    one, eight = (measure(model, images_of(8).split(size)) for size in (1, 8))
    np.testing.assert_allclose(one.contribution, eight.contribution, rtol=1e-4, atol=1e-7)
    assert one.per_image == eight.per_image


def test_folding_leaves_the_field_alone():
    model = fill_by_name(micro_slak()).eval().requires_grad_(False)
    before = measure(model, [images_of(2)]).contribution
    np.testing.assert_allclose(measure(model.fold(), [images_of(2)]).contribution, before,
                               rtol=1e-3, atol=1e-5 * before.max())


def by_the_definition(values: np.ndarray, threshold: float) -> int:
    """Squares of growing sides, one after the other, as published but from a side of 1."""
    height, width = values.shape
    for half in range(max(height, width)):
        top, left = max(height // 2 - half, 0), max(width // 2 - half, 0)
        square = values[top:height // 2 + half + 1, left:width // 2 + half + 1]
        if square.sum() / values.sum() > threshold:
            return min(2 * half + 1, max(height, width))
    return max(height, width)


@pytest.mark.parametrize("shape", [(16, 16), (17, 17), (12, 21), (1, 1)])
def test_extents_follow_the_definition(shape):
    map_ = np.random.RandomState(0).exponential(size=shape) ** 3
    for scale, values in (("log", np.log10(map_ + 1)), ("linear", map_)):
        wanted = [by_the_definition(values, threshold) for threshold in THRESHOLDS]
        assert [found.side for found in extents(map_, scale)] == wanted


def test_where_no_square_reaches_the_share_it_is_the_whole_map():
    (found,) = extents(np.ones((8, 8)), thresholds=[0.99])  # a side of 7 holds 49 / 64
    assert found == (8, 1.0)


def test_a_square_holds_more_than_the_share():
    map_ = np.ones((3, 3))
    map_[1, 1] = 8  # the centre is exactly a half of all
    assert [found.side for found in extents(map_, "linear", [0.49, 0.5])] == [1, 3]


def test_the_spread_is_that_of_the_single_images():
    sides = [3, 5, 9]
    field = Field(np.ones((9, 9)), 3, 0, {scale: [[(side, side / 10)] * 4 for side in sides]
                                          for scale in ("log", "linear")})
    for row in table_rows("a", "a", field):
        assert row.image_side_mean == pytest.approx(statistics.mean(sides))
        assert row.image_side_std == pytest.approx(statistics.stdev(sides))
        assert row.image_area_std == pytest.approx(statistics.stdev(sides) / 10)
    assert "| 7 +- 3 | 9 +- 3 |" in report(table_rows("a", "a", field), spread=False)
    assert "| 100.00% +- 30.55% |" in report(table_rows("a", "a", field), spread=False)


def test_panels_share_one_scale_and_show_the_tables_squares():
    pytest.importorskip("matplotlib")
    map_ = np.exp(-np.hypot(*np.mgrid[-32:32, -32:32]) / 4)
    maps = {"small": map_, "large |$\\foo$": 50 * map_, "third": map_ ** 2}
    figure = draw(maps)
    panels = [axis for axis in figure.axes if axis.images]
    assert len(panels) == 3
    for axis, (label, shown) in zip(panels, maps.items()):
        (image,) = axis.images
        assert (image.norm.vmin, image.norm.vmax) == (1e-3, 1)
        assert type(image.norm).__name__ == "LogNorm"
        assert image.get_array().max() == 1 and image.get_array().min() == 1e-3
        assert axis.get_title().startswith(label.split()[0])
        assert [patch.get_width() for patch in axis.patches] == [
            found.side for found in extents(shown, "log")]
    assert extents(50 * map_, "log") != extents(50 * map_, "linear")
    figure.savefig(io.BytesIO())  # no character of a name is taken for mathematics


def test_only_the_linear_extents_are_free_of_the_gradients_size():
    map_ = np.exp(-np.hypot(*np.mgrid[-32:32, -32:32]) / 4)
    assert extents(1000 * map_, "linear") == extents(map_, "linear")
    assert all(large.side > small.side for large, small in
               zip(extents(1000 * map_, "log"), extents(map_, "log")))


@pytest.mark.parametrize("name", [name for name in models.list_models()
                                  if name.endswith(("nano", "pico"))])
def test_every_architecture_has_a_field(name):
    """Among them maps of even and odd edges, and Transformers."""
    torch.manual_seed(0)
    model = models.create_model(name, 10).eval().requires_grad_(False)
    size = model.input_size if model.fixed_size else 96
    maps = contributions(model, images_of(2, size))
    assert maps.shape == (2, size, size) and maps.min() >= 0 and maps.flatten(1).any(1).all()
    stride = model.feature_info[-1].stride
    start = size // stride // 2 * stride  # of the central cell
    near = slice(start - 8, start + stride + 8)
    assert maps[:, near, near].flatten(1).any(1).all()


class Broken(OneConv):
    """Its gradient is not finite for images whose first pixel is above 0.5."""

    def forward_with_features(self, images):
        factor = torch.where(images[:, :1, :1, :1] > 0.5, torch.nan, 1.0)
        return super().forward_with_features(images * factor)


def test_images_without_a_finite_gradient_are_left_out_and_counted():
    images = images_of(4)
    images[:, :, 0, 0] = torch.tensor([0.9, 0.1, 0.9, 0.1])[:, None]
    field = measure(Broken(3).eval(), [images])
    assert (field.num_images, field.num_skipped) == (2, 2)
    np.testing.assert_array_equal(field.contribution,
                                  measure(OneConv(3).eval(), [images[1::2]]).contribution)
    with pytest.raises(ValueError, match="2 were not finite"):
        measure(Broken(3).eval(), [images[::2]])


def test_controls_are_each_architecture_once_with_a_runs_first_weights():
    plain, other = ["convnext_bn_pico"], ["convnext_bn_pico", "bn=true"]
    networks = [LoadedModel(label, label, spec, models.create_model(spec[0], 7), settings)
                for label, spec, settings in (("a", plain, {}), ("b", plain, {"seed": 3}),
                                              ("c", other, {}), ("d", plain, {"seed": 8}))]
    found = controls(networks, seed=3)
    first, second = "convnext_bn_pico, untrained", "convnext_bn_pico, untrained (2)"
    assert [control.group for control in found] == [first, second, first]
    assert len({control.label for control in found}) == 3
    torch.manual_seed(fold_seed(3, "student"))
    wanted = models.create_model("convnext_bn_pico", 7).state_dict()
    assert all(torch.equal(value, wanted[name])
               for name, value in found[0].model.state_dict().items())
    for other in (found[2], controls(networks, seed=4)[0]):
        state = other.model.state_dict()
        assert not all(torch.equal(value, wanted[name]) for name, value in state.items())


def test_select():
    source = range(10)
    source = Selection(type("Source", (), {"classes": []})(), source)
    assert select(source, 4, spread=False).indices == [0, 1, 2, 3]
    assert select(source, 4, spread=True).indices == [0, 2, 5, 7]
    assert select(source, 99, spread=True).indices == [*range(10)]


# The command


@pytest.fixture
def weights(tmp_path):
    """Two files of weights of convnext_bn_pico for ten classes."""
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        paths.append(tmp_path / f"weights{seed}.pth")
        torch.save(models.create_model("convnext_bn_pico", 10).state_dict(), paths[-1])
    return paths


def command(weights, out, *more: str) -> list[str]:
    words = [word for path in weights for word in ("--model", "convnext_bn_pico", "--weights",
                                                   str(path))]
    return [*words, "--num-classes", "10", "--data-set", "outlines", "val_size=20", "--images", "3",
            "--size", "32", "--num-workers", "0", "--out", str(out), *more]


def table(out) -> list[dict[str, str]]:
    with open(out / "erf.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_leaves_maps_a_table_and_a_plot(weights, tmp_path, capsys):
    out = tmp_path / "deep" / "erf"
    assert main(command(weights, out, "--labels", "one", "two")) == 0
    rows = table(out)
    names = ["one", "two", "convnext_bn_pico, untrained"]
    assert list(dict.fromkeys(row["network"] for row in rows)) == names
    assert len(rows) == 3 * 2 * 4 and {row["size"] for row in rows} == {"32x32"}
    assert {row["images"] for row in rows} == {"3"}
    shown = capsys.readouterr().out
    assert (out / "erf.md").read_text() in shown and "the first of the validation set" in shown
    for name, file in zip(names, ("one", "two", "convnext_bn_pico_untrained")):
        map_ = np.load(out / f"{file}.npy")
        wanted = [row for row in rows if row["network"] == name and row["scale"] == "log"]
        assert map_.shape == (32, 32)
        assert [str(found.side) for found in extents(map_)] == [row["side"] for row in wanted]
        row = wanted[1]
        assert f"| {row['side']} +- {float(row['image_side_std']):.0f} |" in shown
    pytest.importorskip("matplotlib")
    with Image.open(out / "erf.png") as plot:
        assert plot.width > 600 and len(plot.convert("RGB").getcolors(10 ** 6)) > 100


def test_maps_from_files_give_the_same_extents(weights, tmp_path):
    out = tmp_path / "erf"
    assert main(command(weights[:1], out, "--no-control", "--labels", "one")) == 0
    assert sorted(path.name for path in out.glob("*.npy")) == ["one.npy"]
    assert main(["--matrix", str(out / "one.npy"), "--out", str(tmp_path / "again")]) == 0
    first, again = table(out), table(tmp_path / "again")
    assert [row["side"] for row in first] == [row["side"] for row in again]
    assert [row["area"] for row in first] == [row["area"] for row in again]
    assert again[0]["images"] == again[0]["image_side_std"] == ""
    assert not list((tmp_path / "again").glob("*.npy"))


def test_networks_of_one_name_are_seeds_of_one(weights, tmp_path, capsys):
    out = tmp_path / "erf"
    assert main(command(weights, out, "--no-control", "--labels", "net", "net")) == 0
    rows = table(out)
    assert [row["network"] for row in rows[::8]] == ["net", "net (2)"]
    assert {row["group"] for row in rows} == {"net"}
    sides = [float(row["side"]) for row in rows if (row["scale"], row["threshold"]) == (
        "log", "0.2")]
    shown = capsys.readouterr().out
    assert (f"| net | log | 32x32 | 2 | {np.mean(sides):.1f} +- {np.std(sides, ddof=1):.1f} |"
            in shown)
    assert sorted(path.name for path in out.glob("*.npy")) == ["net.npy", "net_2.npy"]


def test_without_matplotlib_a_sentence_says_how_to_get_plots(weights, tmp_path, capsys,
                                                                monkeypatch):
    monkeypatch.setitem(common.figure_class.__globals__["__builtins__"], "__import__",
                        without_matplotlib(__import__))
    assert main(command(weights[:1], tmp_path / "erf")) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "erf").iterdir()) == [
        "convnext_bn_pico_untrained.npy", "convnext_bn_pico_weights1.pth.npy", "erf.csv", "erf.md"]


def without_matplotlib(real):
    def import_(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)
    return import_


def test_nothing_is_overwritten_unasked(weights, tmp_path, capsys):
    out = tmp_path / "erf"
    assert main(command(weights[:1], out)) == 0
    before = table(out)
    assert main(command(weights[1:], out)) == 2
    assert "would be overwritten" in capsys.readouterr().err and table(out) == before
    assert main(command(weights[1:], out, "--overwrite")) == 0
    assert table(out) != before


def test_the_flags_matter(weights, tmp_path):
    assert main(command(weights[:1], tmp_path / "base")) == 0
    base = table(tmp_path / "base")
    for number, words in enumerate(("--size 64", "--images 5", "--spread", "--seed 1")):
        out = tmp_path / str(number)
        assert main(command(weights[:1], out, *words.split())) == 0
        assert table(out) != base, words
    averaged = torch.load(weights[1])
    torch.save({"model": torch.load(weights[0]), "model_ema": averaged}, tmp_path / "both.pth")
    both = command([tmp_path / "both.pth"], tmp_path / "ema", "--weights-key", "model_ema")
    assert main(both) == 0
    assert main(command(weights[1:], tmp_path / "second")) == 0
    assert [row["side"] for row in table(tmp_path / "ema")] == [
        row["side"] for row in table(tmp_path / "second")] != [row["side"] for row in base]
    assert main(command(weights[:1], tmp_path / "batch", "--batch-size", "3")) == 0
    assert table(tmp_path / "batch") == base


def test_random_weights_are_those_of_the_seed(tmp_path):
    words = ["--model", "convnext_bn_pico", "--weights", "random", "--num-classes", "10",
             "--data-set", "outlines", "val_size=20", "--images", "2", "--size", "32",
             "--num-workers", "0"]
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert main([*words, "--seed", seed, "--out", str(tmp_path / name)]) == 0
    assert table(tmp_path / "a") == table(tmp_path / "b") != table(tmp_path / "c")
    (network, control) = [[row["side"] for row in table(tmp_path / "a")][part]
                          for part in (slice(0, 8), slice(8, 16))]
    assert network == control


def test_a_label_that_is_the_controls(weights, tmp_path, capsys):
    words = command(weights[:1], tmp_path / "erf", "--labels", "convnext_bn_pico, untrained")
    assert main(words) == 2
    assert "is what the control is called" in capsys.readouterr().err
    assert main([*words, "--no-control"]) == 0


def write_images(folder, number: int = 2) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            pixels = np.random.RandomState(i).randint(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def test_images_from_a_folder_with_val_or_the_folder_itself(weights, tmp_path, capsys):
    write_images(tmp_path / "set" / "val")
    words = command(weights[:1], "unused")
    words[words.index("--data-set") + 1:words.index("--data-set") + 3] = ["imagefolder"]
    for path, out in ((tmp_path / "set", "a"), (tmp_path / "set" / "val", "b")):
        assert main([*words, "--data-path", str(path), "--out", str(tmp_path / out)]) == 0
    assert table(tmp_path / "a") == table(tmp_path / "b")
    (tmp_path / "set" / "val" / "a" / "1.png").write_bytes(b"nothing")
    assert main([*words, "--data-path", str(tmp_path / "set"), "--out", str(tmp_path / "c")]) == 2
    assert "1.png" in capsys.readouterr().err
    assert main([*words, "--data-path", str(tmp_path / "set"), "--out", str(tmp_path / "d"),
                 "--skip-bad-images"]) == 0
    assert table(tmp_path / "d")[0]["images"] == "2"
    (tmp_path / "set" / "val").rename(tmp_path / "set" / "train")
    assert main([*words, "--data-path", str(tmp_path / "set"), "--out", str(tmp_path / "e")]) == 2
    assert "holds train/ but no val/" in capsys.readouterr().err


@pytest.mark.parametrize("words, telling", [
    ("", "nothing to measure"),
    ("--model slak_pico", "each --model needs its --weights"),
    ("--model slak_pico --weights random --images 0", "--images must be at least 1"),
    ("--model slak_pico --weights random --size 4", "below one cell"),
    ("--model vit_nano --weights random --size 64", "with --size 224"),
    ("--model slak_pico --weights random --labels a b", "--labels needs 1 names"),
    ("--model slak_pico --weights random --data-path nowhere", "nowhere"),
    ("--model slak_picco --weights random", "Did you mean 'slak_pico'?"),
    ("--checkpoint nothing.pth", "no such file: nothing.pth"),
    ("--matrix nothing.npy", "--matrix nothing.npy is no readable .npy file"),
    ("--images 3 --sizes 4", "Did you mean '--size'?")])
def test_wrong_words_get_a_sentence(tmp_path, capsys, words, telling):
    assert main([*words.split(), "--out", str(tmp_path / "erf")]) == 2
    assert telling in capsys.readouterr().err and not (tmp_path / "erf").exists()


@pytest.mark.parametrize("matrix", [
    np.ones(3), np.ones((2, 2, 2)), np.zeros((4, 4)), -np.ones((4, 4)), np.full((4, 4), np.nan),
    np.array([["a"]]), np.ones((0, 4))])
def test_what_is_no_contribution_map_is_refused(tmp_path, capsys, matrix):
    np.save(tmp_path / "map.npy", matrix)
    assert main(["--matrix", str(tmp_path / "map.npy"), "--out", str(tmp_path / "erf")]) == 2
    assert "must be one map (H, W)" in capsys.readouterr().err
