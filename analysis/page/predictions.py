"""What networks predict for the same images, from files of eval.py or computed here, and what two
of them have in common."""
import itertools
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import data
from analysis.common import Run, by_group, unique_labels
from models.base import VisionModel
from models.distiller import FrozenTeacher
from models.weights import load_teacher, load_trained
from utils.classes import match
from utils.log import progress
from utils.registry import UserError, one_line
from utils.rng import fold_seed


class Predictions(NamedTuple):
    """Of one network, for n images."""

    label: str
    names: list[str]  # of the images
    classes: list[str]
    truth: np.ndarray  # (n,) int64, labels among `classes`
    best: np.ndarray  # (n,) int64, the class that it took each image for
    prob: np.ndarray  # (n,) float, its probability

    @property
    def is_right(self) -> np.ndarray:
        return self.best == self.truth


# From files


def read_predictions(path: Path, label: str) -> Predictions:
    """What eval.py --predictions wrote. Raises UserError for another file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("name", "classes", "label", "top5", "prob")}
        number = len(found["name"])
        columns = [np.asarray(found["label"], np.int64), np.asarray(found["top5"], np.int64)[:, 0],
                   np.asarray(found["prob"], np.float64)]
        names, classes = ([str(value) for value in found[key].ravel()]
                          for key in ("name", "classes"))
        is_good = number > 0 and np.isfinite(columns[2]).all() and all(
            column.shape == (number,) for column in columns) and all(
            0 <= column.min() and column.max() < len(classes) for column in columns[:2])
    except Exception as error:  # of a damaged file: whatever its readers raise
        raise UserError(f"--predictions {path} is no file of eval.py --predictions "
                        f"({one_line(error)[:200]}).") from None
    if not is_good:
        raise UserError(f"--predictions {path} is no file of eval.py --predictions: its columns do "
                        "not fit together.")
    return Predictions(label, names, classes, *columns)


def on_common_images(all_predictions: Sequence[Predictions]) -> list[Predictions]:
    """All for the images that all of them have, in one order, with the classes of the first.
    Images are the same where the last two parts of their names are, class folder and file. Raises
    UserError where there are none, or where the classes or the labels differ."""
    first = all_predictions[0]
    keys = [image_keys(found) for found in all_predictions]
    common = set.intersection(*(set(places) for places in keys))
    wanted = [key for key in keys[0] if key in common]
    if not wanted:
        raise UserError(f"{' and '.join(found.label for found in all_predictions)} have no image "
                        "in common. Evaluate them on the same data.")
    result = []
    for found, places in zip(all_predictions, keys):
        if sorted(found.classes) != sorted(first.classes):
            raise UserError(f"{found.label} and {first.label} were evaluated among different "
                            "classes. Evaluate them on the same data.")
        order = np.array([places[key] for key in wanted])
        label_of = np.array([first.classes.index(name) for name in found.classes])
        result.append(Predictions(
            found.label, [first.names[keys[0][key]] for key in wanted], first.classes,
            label_of[found.truth[order]], label_of[found.best[order]], found.prob[order]))
        differ = int((result[-1].truth != result[0].truth).sum())
        if differ:
            raise UserError(f"{found.label} and {first.label} have different labels for {differ} "
                            "images of the same names. Evaluate them on the same data.")
    return result


def image_keys(found: Predictions) -> dict[str, int]:
    """The place of each image by the end of its name, or by all of it where ends are not unique."""
    ends = ["/".join(Path(name).parts[-2:]) for name in found.names]
    names = ends if len(set(ends)) == len(ends) else found.names
    return {name: place for place, name in enumerate(names)}


# From networks


class Network(NamedTuple):
    """What is run over the images."""

    label: str
    module: nn.Module  # images, normalised with the two below -> logits
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: list[int]  # where the data's classes are among the logits
    preprocessing: tuple[tuple[str, Any], ...]  # arguments of data.eval_transform


def load_students(runs: dict[str, Run], file_name: str, classes: Sequence[str]
                  ) -> tuple[list[Network], list[str]]:
    """The student of each run, by its label; and why others are left out."""
    networks, left_out = [], []
    for label, run in runs.items():
        path = run.folder / file_name
        try:
            trained = load_trained(path)
        except UserError as error:
            left_out.append(f"{label} is not evaluated: {one_line(error)}")
            continue
        model = trained.model
        try:
            labels = match(model.classes, model.num_classes, classes)
        except UserError as error:
            left_out.append(f"{label} is not evaluated: it {one_line(error)}")
            continue
        networks.append(Network(label, model.eval().fold(), model.input_mean, model.input_std,
                                labels, tuple(trained.preprocessing().items())))
    return networks, left_out


def load_teachers(runs: dict[str, Run], students: Sequence[Network], classes: Sequence[str]
                  ) -> tuple[list[Network], list[tuple[str, str]], list[str]]:
    """The teachers of `students`, each once, seeing what the student sees; the labels of teacher
    and student for each pair; and why others are left out."""
    found: dict[tuple, Network] = {}
    pairs, left_out = [], []
    for student in students:
        run = runs[student.label]
        spec = run.args["teacher"]
        if spec == ["none"]:
            continue
        source, key = str(run.args.get("teacher_weights")), run.args.get("teacher_weights_key")
        source = beside_run(run, source)
        identity = (*spec, source, key, run.args["seed"] if source == "random" else None,
                    student.mean, student.std, student.preprocessing)
        if identity not in found:
            torch.manual_seed(fold_seed(run.args["seed"], "teacher"))  # as in training
            try:
                model: VisionModel = load_teacher(spec, source, key, classes)
            except UserError as error:
                left_out.append(f"the teacher of {student.label} is not evaluated: "
                                f"{one_line(error)}")
                continue
            label = unique_labels([*(other.label for other in [*students, *found.values()]),
                                   f"teacher {' '.join(spec)}"])[-1]
            found[identity] = student._replace(
                label=label, module=FrozenTeacher(model, student.mean, student.std),
                labels=list(range(len(classes))))
        pairs.append((found[identity].label, student.label))
    return list(found.values()), pairs, left_out


def beside_run(run: Run, source: str) -> str:
    """A teacher's file as it is found from here: a relative path was relative to the folder that
    the run was started in, which is known where its output folder was relative, too."""
    if "://" in source or Path(source).is_absolute() or Path(source).exists():
        return source
    folder, output = run.folder.resolve(), Path(str(run.args.get("output_dir", "")))
    if not output.is_absolute() and folder.parts[-len(output.parts):] == output.parts:
        started_in = Path(*folder.parts[:len(folder.parts) - len(output.parts)])
        if (started_in / source).is_file():
            return str(started_in / source)
    return source


def evaluate(networks: Sequence[Network], source: data.ImageSource, device: torch.device, *,
             batch_size: int, num_workers: int, skip_bad_images: bool) -> list[Predictions]:
    """Of each network for each readable image, among the data's classes. Networks that take their
    images alike share one pass over them."""
    results = {}
    for how, group in by_group(networks, [network.preprocessing for network in networks]).items():
        modules = [network.module.to(device, memory_format=torch.channels_last)
                   for network in group]
        transforms = [data.BatchTransform(network.mean, network.std, device) for network in group]
        rows: list[list[Tensor]] = []
        loader = data.eval_loader(source, data.eval_transform(**dict(how)), batch_size=batch_size,
                                  num_workers=num_workers, skip_bad_images=skip_bad_images)
        with closing(loader), torch.no_grad(), progress("evaluate", len(loader)) as bar:
            for batch in loader:
                images = batch.images.to(device, memory_format=torch.channels_last)
                row = [batch.indices, batch.labels, batch.readable]
                for network, module, transform in zip(group, modules, transforms):
                    logits = module(transform(images)).float()[:, network.labels]
                    row += [value.cpu() for value in logits.softmax(1).max(1)]
                rows.append(row)
                bar.update()
        index, truth, readable, *columns = [torch.cat(column) for column in zip(*rows)]
        names = [source.name_of(i) for i in index[readable].tolist()]
        truth, *columns = [column[readable].numpy() for column in (truth, *columns)]
        for place, network in enumerate(group):
            prob, best = columns[2 * place:2 * place + 2]
            if not np.isfinite(prob).all():
                raise UserError(f"{network.label} gave logits that are NaN. Its weights are "
                                "broken; leave that run out.")
            results[network.label] = Predictions(network.label, names, list(source.classes), truth,
                                                 best, prob)
    return [results[network.label] for network in networks]


# What they have in common


class Difference(NamedTuple):
    """Top-1 of the first less that of the other, on the same images, in points."""

    first: str
    other: str
    points: float
    low: float  # of the 95 % interval
    high: float
    only_first: int  # images that it alone got right
    only_other: int


def paired_bootstrap(first: Predictions, other: Predictions, num_resamples: int,
                     seed: int) -> Difference:
    """The 95 % percentile interval of the difference over resamples of the images, drawn together
    for both networks (Efron and Tibshirani 1993). A resample matters through three counts alone
    (only the first right, only the other, both or neither), which are multinomial."""
    number = len(first.names)
    only_first = int((first.is_right & ~other.is_right).sum())
    only_other = int((other.is_right & ~first.is_right).sum())
    shares = [only_first / number, only_other / number]
    drawn = np.random.default_rng(seed).multinomial(number, [*shares, max(0.0, 1 - sum(shares))],
                                                    size=num_resamples)
    points = 100 * (drawn[:, 0] - drawn[:, 1]) / number
    low, high = np.percentile(points, [2.5, 97.5])
    return Difference(first.label, other.label, 100 * (only_first - only_other) / number,
                      float(low), float(high), only_first, only_other)


def all_differences(found: Sequence[Predictions], num_resamples: int, seed: int
                    ) -> list[Difference]:
    return [paired_bootstrap(first, other, num_resamples, seed)
            for first, other in itertools.combinations(found, 2)]


def confusions(found: Predictions) -> np.ndarray:
    """(K, K) int64: images of each class (rows) by what they were taken for (columns)."""
    number = len(found.classes)
    return np.bincount(found.truth * number + found.best,
                       minlength=number ** 2).reshape(number, number)


def most_confused(found: Predictions, most: int) -> list[tuple[str, str, int, int]]:
    """True class, what it was taken for, of how many images, of how many of that class."""
    pairs, counts = np.unique(np.stack([found.truth, found.best])[:, ~found.is_right], axis=1,
                              return_counts=True)
    of_class = np.bincount(found.truth, minlength=len(found.classes))
    order = np.lexsort((*pairs[::-1], -counts))[:most]
    return [(found.classes[pairs[0, i]], found.classes[pairs[1, i]], int(counts[i]),
             int(of_class[pairs[0, i]])) for i in order]


def confident_mistakes(found: Predictions, most: int) -> list[int]:
    """Places of wrongly classified images, the most probable class first."""
    wrong = np.flatnonzero(~found.is_right)
    return wrong[np.argsort(-found.prob[wrong], kind="stable")][:most].tolist()


def disagreements(first: Predictions, other: Predictions, most: int) -> list[int]:
    """Places of images that two networks take for different classes, first those where the less
    sure of the two is surest."""
    differ = np.flatnonzero(first.best != other.best)
    sure = np.minimum(first.prob, other.prob)[differ]
    return differ[np.argsort(-sure, kind="stable")][:most].tolist()
