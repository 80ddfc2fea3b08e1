"""ImageNet's further test sets: tiny folders in the layout of their authors, values by hand."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

import data
import engine
import eval as evaluation
import train_kd
from data.robustness import ALEXNET_ERRORS, EXTRA, imagenet_wnids
from models import create_model
from models.base import IMAGENET_MEAN, IMAGENET_STD

REPOSITORY = Path(__file__).parent.parent
SIZE, SHORT = 48, 54  # pixels: the network's, and of an image's short side at 224/256
NUM_IMAGES = 24
WNIDS = imagenet_wnids()
C_GROUPS = [(name, severity) for name in ALEXNET_ERRORS for severity in range(1, 6)]
TARS = {"noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
        "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        "weather": ("snow", "frost", "fog", "brightness"),
        "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression")}


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> list[Path]:
    """Images that the sets are made of."""
    folder, rng = tmp_path_factory.mktemp("pool"), np.random.default_rng(0)
    paths = [folder / f"{number:02d}.jpg" for number in range(NUM_IMAGES)]
    for path in paths:
        colours = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        colours.resize((72, 60), Image.Resampling.BICUBIC).save(path, quality=95)
    return paths


@torch.no_grad()
def logits_of(model, paths: list[Path], short: int) -> Tensor:
    """As torchvision would have it: short side, centre, normalised."""
    steps = T.Compose([T.Resize(short, T.InterpolationMode.BICUBIC), T.CenterCrop(SIZE),
                       T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    images = torch.stack([steps(Image.open(path).convert("RGB")) for path in paths])
    return model.eval()(images)


def seeded_model(name: str, num_classes: int, pool: list[Path]):
    """Random weights that see many classes in the images."""
    torch.manual_seed(0)
    model = create_model(name, num_classes)
    head = getattr(model, "fc", None) or model.head
    torch.nn.init.normal_(head.weight)
    head.bias.data -= logits_of(model, pool, SHORT).mean(0)
    return model


@pytest.fixture(scope="module")
def model(pool):
    return seeded_model("resnet_nano", 1000, pool)


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> list[str]:
    """Flags that name it."""
    path = tmp_path_factory.mktemp("weights") / "plain.pth"
    torch.save(model.state_dict(), path)
    return ["--model", "resnet_nano", "--weights", str(path), "--input-size", str(SIZE)]


@pytest.fixture(scope="module")
def logits(model, pool) -> Tensor:
    """(NUM_IMAGES, 1000)"""
    return logits_of(model, pool, SHORT)


@pytest.fixture
def evaluate(capsys):
    """Flags -> the rows of the report, and all that was printed."""
    def run(*words: object) -> tuple[dict[str, str], str]:
        capsys.readouterr()
        code = evaluation.main(["--batch-size", "4", "--num-workers", "0", *map(str, words)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return rows_of(out), out + err

    return run


def rows_of(printed: str) -> dict[str, str]:
    return dict(re.split(" {2,}", line, maxsplit=1) for line in printed.splitlines()
                if "  " in line)


def place(pool: list[Path], root: Path, labels: list[int], names: list[str] = WNIDS,
          file_name: str = "{:02d}.jpg") -> None:
    """Image k into the folder of labels[k]."""
    for number, (path, label) in enumerate(zip(pool, labels)):
        folder = root / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / file_name.format(number + 1))


def half_right(logits: Tensor, classes: list[int]) -> list[int]:
    """A label per image: for every second the best of `classes`, else each of them in turn."""
    best = logits[:, classes].argmax(1).tolist()
    return [classes[best[k] if k % 2 else k // 2 % len(classes)] for k in range(len(best))]


def percent(hits: Tensor) -> str:
    return f"{100 * hits.double().mean():.2f} %"


SOME = [9, 107, 2, 880, 541, 300, 999]  # classes that the images are hardly seen as


def test_the_classes_are_imagenets():
    assert WNIDS == sorted({*WNIDS}) and len(WNIDS) == 1000
    assert (WNIDS[0], WNIDS[1], WNIDS[217], WNIDS[999]) == (
        "n01440764", "n01443537", "n02102040", "n15075141")


# -A, -R, -Sketch


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_only_the_classes_of_a_and_r_compete(name, pool, logits, weights, evaluate, tmp_path):
    labels = half_right(logits, SOME)
    root = tmp_path / name.replace("_", "-")
    place(pool, root, labels)
    (root / "README.txt").write_text("images")
    (root / ".cache").mkdir()
    rows, printed = evaluate(*weights, "--data-set", name, "--data-path", root)
    target = torch.tensor([SOME.index(label) for label in labels])
    sliced = logits[:, SOME]
    hits = sliced.topk(5).indices == target[:, None]
    assert rows["images"] == str(NUM_IMAGES)
    assert rows["top-1"] == percent(hits[:, 0]) and rows["top-5"] == percent(hits.any(1))
    loss = torch.nn.functional.cross_entropy(sliced, target)
    assert float(rows["cross-entropy"]) == pytest.approx(loss.item(), abs=2e-3)
    assert rows["classes"] == "7 of the model's 1000 compete"
    assert f"{name}: 7 of its 200 classes are there" in printed
    everywhere = logits.argmax(1) == torch.tensor(labels)
    assert everywhere.sum() < hits[:, 0].sum() < NUM_IMAGES  # else this shows nothing


def test_all_classes_compete_on_sketch(pool, logits, weights, evaluate, tmp_path):
    labels = half_right(logits, logits.argmax(1).unique().tolist())
    place(pool, tmp_path / "sketch", labels, file_name="sketch_{}.JPEG")
    rows, _ = evaluate(*weights, "--data-set", "imagenet_sketch",
                       "--data-path", tmp_path / "sketch")
    hits = logits.topk(5).indices == torch.tensor(labels)[:, None]
    assert NUM_IMAGES / 2 <= hits[:, 0].sum() < NUM_IMAGES
    assert rows["top-1"] == percent(hits[:, 0]) and rows["top-5"] == percent(hits.any(1))
    assert "classes" not in rows


def test_what_does_not_compete_is_no_prediction(pool, logits, weights, evaluate, tmp_path):
    few = [300, 9, 541]
    labels = half_right(logits, few)
    place(pool, tmp_path / "a", labels)
    rows, _ = evaluate(*weights, "--data-set", "imagenet_a", "--data-path", tmp_path / "a",
                       "--predictions", tmp_path / "p.npz")
    assert rows["top-5"] == "100.00 %"
    saved = np.load(tmp_path / "p.npz")
    assert list(saved["classes"]) == WNIDS
    for name, label, top5 in zip(saved["name"], saved["label"], saved["top5"]):
        number = int(Path(name).stem) - 1
        assert labels[number] == label and Path(name).parent.name == WNIDS[label]
        best = logits[number, few].argsort(descending=True)
        assert top5.tolist() == [*torch.tensor(few)[best].tolist(), -1, -1]


def test_the_network_alone_stays_in_evaluation(pool, logits, weights, evaluate, tmp_path,
                                               monkeypatch):
    """Its speed is measured after the restricted evaluation, in the mode of that."""
    seen = []
    throughput = evaluation.throughput

    def look(model, *args):
        seen.append((type(model).__name__, [m.training for m in model.modules()]))
        return throughput(model, *args)

    monkeypatch.setattr(evaluation, "throughput", look)
    place(pool, tmp_path / "a", half_right(logits, SOME))
    evaluate(*weights, "--data-set", "imagenet_a", "--data-path", tmp_path / "a")
    assert seen[0][0] == "ResNet" and not any(seen[0][1])


def test_large_kernels_are_chosen_below_the_restriction(pool, evaluate, tmp_path):
    model = seeded_model("slak_nano", 1000, pool)
    torch.save(model.state_dict(), tmp_path / "slak.pth")
    logits = logits_of(model, pool, SHORT)
    labels = half_right(logits, SOME)
    place(pool, tmp_path / "a", labels)
    rows, printed = evaluate(
        "--model", "slak_nano", "--weights", tmp_path / "slak.pth", "--input-size", SIZE,
        "--large-kernel", "torch", "--data-set", "imagenet_a", "--data-path", tmp_path / "a")
    best = torch.tensor(SOME)[logits[:, SOME].argmax(1)]
    assert "large kernels by torch" in printed
    assert rows["top-1"] == percent(best == torch.tensor(labels))


# -V2


@pytest.mark.parametrize("by", ["index", "wnid"])
def test_the_folders_of_v2_are_labels_not_places(by, pool, logits, weights, evaluate, tmp_path):
    """0, 1, 10, 100, 2: in order of name, 10 is the third class."""
    classes = [0, 1, 2, 9, 10, 11, 19, 100, 101, 999]
    names = WNIDS if by == "wnid" else [str(label) for label in range(1000)]
    labels = half_right(logits, classes)
    root = tmp_path / "imagenetv2-matched-frequency-format-val"
    place(pool, root, labels, names, "{:040x}.jpeg")
    source = data.create_dataset("imagenet_v2", "val", str(root))
    source.align(None, 1000)
    for index in range(len(source)):
        folder = Path(source.name_of(index)).parent.name
        assert names[source.load(index)[1]] == folder
    assert {source.load(index)[1] for index in range(len(source))} == {*classes}
    place(pool, root, logits.argmax(1).tolist(), names, "best{}.jpeg")
    rows, _ = evaluate(*weights, "--data-set", "imagenet_v2", "--data-path", root)
    hits = logits.argmax(1) == torch.tensor(labels)
    assert rows["top-1"] == percent(torch.cat([hits, torch.ones_like(hits)]))


# ReaL


def real_set(root: Path, pool: list[Path], labels: list[int], answers: list[list[int]]) -> Path:
    place(pool, root / "val", labels, file_name="ILSVRC2012_val_{:08d}.JPEG")
    rest = [[7]] * (50_000 - len(answers))  # of images that are not there
    (root / "real.json").write_text(json.dumps(answers + rest))
    return root


def real_answers(best: list[int]) -> list[list[int]]:
    """In turn: none, the best class among others, others, the best class alone."""
    kinds = ([], [5, None, 6], [5, 6], [None])
    return [[label if answer is None else answer for answer in kinds[k % 4]]
            for k, label in enumerate(best)]


@pytest.mark.parametrize("place_of_labels", ["beside", "named"])
def test_real_labels(place_of_labels, pool, logits, weights, evaluate, tmp_path):
    best = logits.argmax(1).tolist()
    assert not {5, 6, 7} & {*best}
    labels = half_right(logits, logits.argmax(1).unique().tolist())
    root, words = real_set(tmp_path / "imagenet", pool, labels, real_answers(best)), []
    if place_of_labels == "named":
        shutil.move(root / "real.json", tmp_path / "elsewhere.json")
        words = [f"labels={tmp_path}/elsewhere.json"]
    rows, _ = evaluate(*weights, "--data-set", "imagenet_real", *words, "--data-path", root)
    assert rows["images"] == "24"
    assert rows["top-1"] == percent(logits.argmax(1) == torch.tensor(labels))
    # Of four images one has no answers, and of the other three two have the best class.
    assert rows["ReaL top-1"] == "66.67 % of the 18 images that have such labels"


def test_a_skipped_image_has_no_real_label(pool, logits, weights, evaluate, tmp_path):
    best = logits.argmax(1).tolist()
    root = real_set(tmp_path, pool, best, real_answers(best))
    for number in (4, 12, 15):  # once among others, alone, and once wrong
        os.truncate(root / "val" / WNIDS[best[number - 1]] / f"ILSVRC2012_val_{number:08d}.JPEG", 9)
    rows, printed = evaluate(*weights, "--data-set", "imagenet_real", "--data-path", root,
                             "--skip-bad-images")
    assert "skipped, 3 so far" in printed and rows["images"] == "21"
    assert rows["ReaL top-1"] == "66.67 % of the 15 images that have such labels"


# -C


def c_set(root: Path, pool: list[Path], logits: Tensor, in_tars: bool = False
          ) -> dict[tuple[str, int], Tensor]:
    """Two classes, a few images of each in every folder; whether each is right, as the model at
    crop 1.0 sees it."""
    rng = np.random.default_rng(1)
    best = logits.argmax(1).tolist()
    classes = sorted({*best}, key=best.count)[-2:]
    home = {name: tar for tar, names in TARS.items() for name in names}
    assert home.keys() == ALEXNET_ERRORS.keys()
    hits = {}
    for name, severity in C_GROUPS:
        folder = (root / home[name] if in_tars else root) / name / str(severity)
        chosen = rng.choice(len(pool), int(rng.integers(4, 8)), replace=False).tolist()
        labels = [classes[k % 2] for k in range(len(chosen))]
        place([pool[k] for k in chosen], folder, labels, file_name="ILSVRC2012_val_{:08d}.JPEG")
        hits[name, severity] = torch.tensor([best[k] == label
                                             for k, label in zip(chosen, labels)])
    return hits


PUBLISHED = (0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816,
             0.826572, 0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500)


OF_TWO = " over 2 of the 1000 classes, AlexNet's errors over all"


def errors_by_hand(hits: dict[tuple[str, int], Tensor]) -> list[float]:
    """Per corruption: the mean over its severities of one minus top-1."""
    return [sum(1 - hits[name, severity].double().mean().item() for severity in range(1, 6)) / 5
            for name in ALEXNET_ERRORS]


@pytest.mark.parametrize("in_tars", [False, True])
def test_mean_corruption_error(in_tars, pool, model, weights, evaluate, tmp_path):
    hits = c_set(tmp_path / "c", pool, logits_of(model, pool, SIZE), in_tars)
    (tmp_path / "c" / "extra" / "spatter" / "1").mkdir(parents=True)
    rows, _ = evaluate(*weights, "--data-set", "imagenet_c", "--data-path", tmp_path / "c")
    errors = errors_by_hand(hits)
    ratios = [error / alexnet for error, alexnet in zip(errors, PUBLISHED)]
    assert len({f"{error:.4f}" for error in errors}) > 5
    for name, error, ratio in zip(ALEXNET_ERRORS, errors, ratios):
        assert rows[name] == f"error {100 * error:.2f} %, CE {100 * ratio:.2f} %"
    assert rows["mean error"] == f"{100 * sum(errors) / 15:.2f} %"
    assert rows["mCE"] == f"{100 * sum(ratios) / 15:.2f} %{OF_TWO}"
    assert rows["top-1"] == percent(torch.cat([*hits.values()]))
    assert "spatter" not in rows


def test_alexnet_has_an_mce_of_100(pool, logits, tmp_path):
    c_set(tmp_path, pool, logits)
    source = data.create_dataset("imagenet_c", "val", str(tmp_path))
    source.num_present = 1000
    errors = torch.tensor(PUBLISHED, dtype=torch.float64).repeat_interleave(5)
    rows = source.metric.rows(torch.stack([50_000 * (1 - errors), torch.full((75,), 50_000.0)]))
    assert rows["mCE"] == "100.00 %" and rows["fog"] == "error 81.93 %, CE 100.00 %"


def test_the_images_of_c_are_not_resized(pool, model, evaluate, weights, tmp_path):
    """Neither by the default nor by the checkpoint's; --crop-pct wins."""
    at_1, at_875 = logits_of(model, pool, SIZE), logits_of(model, pool, SHORT)
    labels = at_1.argmax(1).tolist()
    assert percent(at_875.argmax(1) == torch.tensor(labels)) != "100.00 %"
    for severity in range(1, 6):
        place(pool, tmp_path / "fog" / str(severity), labels)
    words = ["--data-set", "imagenet_c", "corruptions=fog", "--data-path", tmp_path]
    settings = {"student": ["resnet_nano"], "num_classes": 1000, "input_size": SIZE,
                "data_set": ["imagefolder"], "crop_pct": 0.875}
    torch.save({"args": settings, "model": model.state_dict()}, tmp_path / "own.pth")
    for source in (weights, ["--checkpoint", tmp_path / "own.pth"]):
        assert evaluate(*source, *words)[0]["top-1"] == "100.00 %"
        rows, _ = evaluate(*source, *words, "--crop-pct", "0.875")
        assert rows["top-1"] == percent(at_875.argmax(1) == torch.tensor(labels))
    # Other sets see as much of an image as the checkpoint says.
    place(pool, tmp_path / "v2", labels)
    v2 = ["--data-set", "imagenet_v2", "--data-path", tmp_path / "v2"]
    assert evaluate("--checkpoint", tmp_path / "own.pth", *v2)[0]["top-1"] == rows["top-1"]


def test_some_corruptions_have_no_mce(pool, model, weights, evaluate, tmp_path):
    hits = c_set(tmp_path, pool, logits_of(model, pool, SIZE))
    for name in ("fog", "snow"):
        shutil.copytree(tmp_path / name, tmp_path / "extra" / f"{name}_copy")
    shutil.move(tmp_path / "extra" / "fog_copy", tmp_path / "extra" / "spatter")
    errors = dict(zip(ALEXNET_ERRORS, errors_by_hand(hits)))
    rows, _ = evaluate(*weights, "--data-set", "imagenet_c", "corruptions=spatter,snow",
                       "--data-path", tmp_path)
    assert rows["spatter"] == f"error {100 * errors['fog']:.2f} %"
    assert rows["snow"].startswith(f"error {100 * errors['snow']:.2f} %, CE ")
    assert rows["mean error"] == f"{50 * (errors['fog'] + errors['snow']):.2f} %"
    assert rows["mCE"] == "none: it takes all 15 corruptions" and "fog" not in rows
    everything = ",".join([*ALEXNET_ERRORS, "spatter"])
    beyond, _ = evaluate(*weights, "--data-set", "imagenet_c", f"corruptions={everything}",
                         "--data-path", tmp_path)
    ratios = [errors[name] / alexnet for name, alexnet in zip(ALEXNET_ERRORS, PUBLISHED)]
    assert beyond["mCE"] == f"{100 * sum(ratios) / 15:.2f} %{OF_TWO}"


def test_a_skipped_image_is_in_no_error(pool, model, weights, evaluate, tmp_path):
    logits = logits_of(model, pool, SIZE)
    labels = logits.argmax(1).tolist()
    wrong = min({*range(1000)} - {*labels})
    for severity in range(1, 6):
        place(pool, tmp_path / "fog" / str(severity), labels)
        place(pool[:1], tmp_path / "fog" / str(severity), [wrong])
        (tmp_path / "fog" / str(severity) / WNIDS[wrong] / "01.jpg").write_bytes(b"no image")
    rows, _ = evaluate(*weights, "--data-set", "imagenet_c", "corruptions=fog", "--data-path",
                       tmp_path, "--skip-bad-images")
    assert rows["fog"] == "error 0.00 %, CE 0.00 %" and rows["top-1"] == "100.00 %"


def test_two_processes_give_the_same_values(pool, model, weights, evaluate, tmp_path):
    c_set(tmp_path, pool, logits_of(model, pool, SIZE))
    words = [*weights, "--data-set", "imagenet_c", "--data-path", str(tmp_path)]
    one, _ = evaluate(*words)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "eval.py", "--batch-size", "4", "--num-workers", "0", *words], cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    two = rows_of(result.stdout)
    assert len(one) > 20
    for name in one:
        if not name.startswith("images/s"):
            assert one[name] == two[name], name


@pytest.mark.parametrize("name", ["imagenet_real", "imagenet_c"])
def test_counts_are_additive(name, pool, logits, tmp_path):
    best = logits.argmax(1).tolist()
    if name == "imagenet_c":
        c_set(tmp_path, pool, logits)
    else:
        real_set(tmp_path, pool, best, real_answers(best))
    source = data.create_dataset(name, "val", str(tmp_path))
    source.align(None, 1000)
    index = torch.arange(len(source))
    top5 = torch.randint(0, 1000, (len(index), 5), generator=torch.Generator().manual_seed(0))
    top5[::2, 0] = torch.tensor([source.load(k)[1] for k in index[::2].tolist()])
    count = source.metric.count
    whole, none = count(index, top5), count(index[:0], top5[:0])
    parts = [count(index[rank::3], top5[rank::3]) for rank in range(3)]
    assert whole.dtype == none.dtype == torch.float64 and whole.sum() > 0
    assert torch.equal(sum(parts) + none, whole)


# A model of some of the classes


@pytest.fixture(scope="module")
def ten(pool, tmp_path_factory) -> tuple[torch.nn.Module, list[str], list[str]]:
    """A network of ten classes out of order, their names, and the flag of its checkpoint."""
    model = seeded_model("resnet_nano", 10, pool)
    classes = [WNIDS[label] for label in (880, 9, 107, 2, 541, 300, 999, 50, 60, 70)]
    settings = {"student": ["resnet_nano"], "num_classes": 10, "input_size": SIZE,
                "data_set": ["imagefolder"], "crop_pct": None}
    path = tmp_path_factory.mktemp("ten") / "own.pth"
    torch.save({"args": settings, "model": model.state_dict(), "classes": classes}, path)
    return model, classes, ["--checkpoint", str(path)]


OF_TEN = [0, 3, 5, 6]  # its classes that the set has


def mixed_labels(own: Tensor, classes: list[str]) -> list[int]:
    """Places among ImageNet's; every third image is of a class that the model does not know."""
    best = own[:, OF_TEN].argmax(1).tolist()
    return [4 + k % 2 if k % 3 == 0 else
            WNIDS.index(classes[OF_TEN[best[k] if k % 2 else k // 2 % 4]])
            for k in range(NUM_IMAGES)]


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_sketch"])
def test_classes_are_matched_by_name(name, ten, pool, evaluate, tmp_path):
    model, classes, flags = ten
    own = logits_of(model, pool, SHORT)
    labels = mixed_labels(own, classes)
    place(pool, tmp_path / "set", labels)
    rows, printed = evaluate(*flags, "--data-set", name, "--data-path", tmp_path / "set",
                             "--predictions", tmp_path / "p.npz")
    known = torch.tensor([WNIDS[label] in classes for label in labels])
    target = torch.tensor([classes.index(WNIDS[label]) if is_known else 0
                           for label, is_known in zip(labels, known)])[known]
    competing = OF_TEN if name == "imagenet_a" else list(range(10))
    best = torch.tensor(competing)[own[known][:, competing].argmax(1)]
    assert f"{name}: left out 2 of 6 classes, 8 of 24 images" in printed
    assert rows["images"] == "16" and known.sum() == 16
    assert rows["top-1"] == percent(best == target)
    assert rows.get("classes") == (
        "4 of the model's 10 compete" if name == "imagenet_a" else None)
    saved = np.load(tmp_path / "p.npz")
    assert list(saved["classes"]) == classes
    for path, label in zip(saved["name"], saved["label"]):
        assert Path(path).parent.name == classes[label]


def test_real_labels_of_some_classes(ten, pool, evaluate, tmp_path):
    """An answer that the model cannot give is none."""
    model, classes, flags = ten
    own = logits_of(model, pool, SHORT).argmax(1).tolist()
    labels = [WNIDS.index(classes[k % 10]) for k in range(NUM_IMAGES)]
    kinds = [lambda best: [1, best], lambda best: [1], lambda best: []]
    answers = [kinds[k % 3](WNIDS.index(classes[best])) for k, best in enumerate(own)]
    real_set(tmp_path, pool, labels, answers)
    rows, _ = evaluate(*flags, "--data-set", "imagenet_real", "--data-path", tmp_path)
    assert rows["ReaL top-1"] == "100.00 % of the 8 images that have such labels"


def test_alexnet_does_not_compare_with_some_classes(ten, pool, evaluate, tmp_path):
    model, classes, flags = ten
    own = logits_of(model, pool, SIZE)
    labels = mixed_labels(own, classes)
    for name, severity in C_GROUPS:
        place(pool, tmp_path / name / str(severity), labels)
    rows, _ = evaluate(*flags, "--data-set", "imagenet_c", "--data-path", tmp_path)
    known = [k for k, label in enumerate(labels) if WNIDS[label] in classes]
    target = torch.tensor([classes.index(WNIDS[labels[k]]) for k in known])
    wrong = (own[known].argmax(1) != target).double().mean()
    assert rows["fog"] == f"error {100 * wrong:.2f} %"
    assert "of all classes" in rows["mCE"]


# What is refused


def folder_of(root: Path, *parts: str) -> Path:
    path = root.joinpath(*parts)
    path.mkdir(parents=True)
    return path


def one_image(root: Path, *parts: str) -> Path:
    path = folder_of(root, *parts) / "ILSVRC2012_val_00000001.JPEG"
    Image.new("RGB", (50, 50)).save(path)
    return path


def real_json(content: str):
    def make(root: Path) -> None:
        one_image(root, "val", WNIDS[0])
        (root / "real.json").write_text(content)
    return make


def real_image(name: str):
    def make(root: Path) -> None:
        real_json(json.dumps([[0]] * 50_000))(root)
        path = root / "val" / WNIDS[0] / "ILSVRC2012_val_00000001.JPEG"
        path.rename(path.with_name(name))
    return make


def fog(*but: int):
    def make(root: Path) -> None:
        for severity in {1, 2, 3, 4, 5} - {*but}:
            one_image(root, "weather", "fog", str(severity), WNIDS[0])
    return make


def other_fog(root: Path) -> None:
    fog()(root)
    one_image(root, "weather", "fog", "4", WNIDS[1])


REFUSED = {
    "no path": ("imagenet_a", None, ("--data-set imagenet_a needs --data-path", "<wnid>/*.jpg")),
    "no folder": ("imagenet_sketch", lambda root: root.rmdir(),
                  ("imagenet_sketch", "set, which is no folder", "<wnid>/*.JPEG")),
    "nothing in it": ("imagenet_r", lambda root: (root / "README.txt").touch(),
                      ("set has no class folders", "n01440764", "--data-path")),
    "the folder above": ("imagenet_a", lambda root: one_image(root, "imagenet-a", WNIDS[0]),
                         ("the folder(s) imagenet-a;", "n01440764", "folder that holds those")),
    "an index": ("imagenet_a", lambda root: one_image(root, "12"), ("the folder(s) 12;",)),
    "no index": ("imagenet_v2", lambda root: one_image(root, "1000"),
                 ("the folder(s) 1000;", "0 ... 999")),
    "an empty class": ("imagenet_v2", lambda root: (one_image(root, "7"), folder_of(root, "8")),
                       ("1 class folder(s) hold no images", "set/8", "Fill or remove")),
    "no validation set": ("imagenet_real", lambda root: (root / "real.json").write_text(
        json.dumps([[0]] * 50_000)), ("set/val is not a folder", "n01440764")),
    "no real.json": ("imagenet_real", lambda root: one_image(root, "val", WNIDS[0]),
                     ("set/real.json cannot be read", "No such file", "labels=FILE")),
    "no JSON": ("imagenet_real", real_json("[[1], [2"), ("real.json is not readable JSON",)),
    "not lists": ("imagenet_real", real_json("[1, 2]"),
                  ("real.json", "list of lists", "0 ... 999")),
    "no list": ("imagenet_real", real_json('{"1": [2]}'), ("real.json", "list of lists")),
    "no class": ("imagenet_real", real_json("[[1000]]"), ("real.json", "list of lists")),
    "no number": ("imagenet_real", real_json("[[3.0]]"), ("real.json", "list of lists")),
    "too short": ("imagenet_real", real_json("[[1], []]"), ("has 2 entries", "expected 50,000")),
    "other names": ("imagenet_real", real_image("dog.jpg"),
                    ("dog.jpg is not called ILSVRC2012_val_00000001.JPEG", "Keep the names")),
    "names beyond": ("imagenet_real", real_image("ILSVRC2012_val_00050001.JPEG"),
                     ("00050001.JPEG is not called", "ILSVRC2012_val_00050000.JPEG")),
    "corruptions": ("imagenet_c", fog(),
                    ("set lacks gaussian_noise, shot_noise, impulse_noise", "frost, brightness",
                     "set/*/<corruption>", "corruptions=")),
    "severity": ("imagenet_c corruptions=fog", fog(3, 5), ("set lacks fog/3, fog/5;",)),
    "other classes": ("imagenet_c corruptions=fog", other_fog,
                      ("fog/4 has 2 class folders that are not the 1 of fog/1", "Unpack")),
    "unknown corruption": ("imagenet_c corruptions=fogg,snow", fog(),
                           ("no corruption 'fogg'", "jpeg_compression", "Did you mean 'fog'")),
    "a number": ("imagenet_c corruptions=3", fog(), ("no corruption 3", "Known: gaussian_noise")),
}


def refused(capsys, monkeypatch, words: list[str], telling: tuple[str, ...]) -> None:
    def too_late(*args, **kwargs):
        pytest.fail("it was noticed only when the evaluation had begun")

    monkeypatch.setattr(engine, "evaluate", too_late)
    capsys.readouterr()
    assert evaluation.main([*words, "--num-workers", "0"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("eval.py: error: ") and len(said.splitlines()) == 1
    for word in telling:
        assert word in said, f"{word!r} is not in: {said}"


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, weights, capsys, monkeypatch, tmp_path):
    names, make, telling = REFUSED[case]
    words = [*weights, "--data-set", *names.split()]
    if make is not None:
        make(folder_of(tmp_path, "set"))
        words += ["--data-path", str(tmp_path / "set")]
    refused(capsys, monkeypatch, words, telling)


def test_a_model_of_other_classes_is_refused(ten, pool, capsys, monkeypatch, tmp_path):
    one_image(tmp_path, "set", WNIDS[4])
    words = ["--data-set", "imagenet_v2", "--data-path", str(tmp_path / "set")]
    refused(capsys, monkeypatch, [*ten[2], *words],
            ("knows none of the 1 classes", ", ... (10)", WNIDS[4], "named by wnid"))
    torch.save(ten[0].state_dict(), tmp_path / "bare.pth")
    bare = ["--model", "resnet_nano", "--weights", str(tmp_path / "bare.pth"), "--num-classes",
            "10", *words]
    refused(capsys, monkeypatch, bare, ("has 10 classes and nothing says which", "--checkpoint"))


def test_a_checkpoint_without_names_is_imagenets(model, pool, logits, evaluate, tmp_path):
    settings = {"student": ["resnet_nano"], "num_classes": 1000, "input_size": SIZE,
                "data_set": ["imagefolder"], "crop_pct": None}
    torch.save({"args": settings, "model": model.state_dict()}, tmp_path / "own.pth")
    place(pool, tmp_path / "set", logits.argmax(1).tolist())
    rows, _ = evaluate("--checkpoint", tmp_path / "own.pth", "--data-set", "imagenet_sketch",
                       "--data-path", tmp_path / "set")
    assert rows["top-1"] == "100.00 %"


@pytest.mark.parametrize("name", [name for name in data.list_datasets() if "imagenet_" in name])
def test_nothing_is_trained_on_them(name, capsys, tmp_path):
    one_image(tmp_path, WNIDS[0])
    assert train_kd.main(["--teacher", "none", "--data-set", name, "--data-path", str(tmp_path),
                          "--output-dir", str(tmp_path / "runs")]) == 2
    assert f"--data-set {name} has no images to train on" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_all_of_them_are_there():
    assert {f"imagenet_{name}" for name in ("a", "r", "sketch", "v2", "real", "c")} < {
        *data.list_datasets()}
    assert not {*EXTRA} & {*ALEXNET_ERRORS} and tuple(ALEXNET_ERRORS.values()) == PUBLISHED
