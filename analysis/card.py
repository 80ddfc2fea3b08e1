"""The model card of a student: what it is, where it comes from, how good it is, how to load it."""
from pathlib import Path
from typing import Any

import yaml

import data
from analysis.common import Run, read_run
from analysis.formats import FORMATS, Student
from models.weights import Trained
from utils.checkpoint import load_file
from utils.classes import shortened
from utils.registry import UserError

# Of a run's settings: where it ran and lay, which says nothing about the student.
OF_THE_MACHINE = {"config", "data_path", "output_dir", "resume", "auto_resume", "num_workers",
                  "print_every", "dry_run", "tensorboard", "device", "teacher_weights",
                  "student_weights", "save_freq", "save_num", "save_every_steps", "save_best"}
LICENCE = ("The code is under the MIT licence (LICENSE of the repository). Of the weights nothing "
           "is said here: the terms of the training images and of the teacher's weights apply.")


def model_card(student: Student, file_name: str, name: str, comparison: str, *,
               checkpoint: Path | None, weights_key: str | None, source: str | None) -> str:
    """Markdown. What is not known of the student is said to be unknown."""
    model, settings = student.model, student.settings
    rows = {"student": f"`{' '.join(student.spec)}`, {model.num_parameters:,} parameters, "
                       f"{model.count_macs(student.input_size) / 1e9:.3f} G MACs at "
                       f"{student.input_size} px"}
    title = student.spec[0]
    if checkpoint is None:
        rows |= {"weights": Path(source).name if source != "published" else
                 "as published by its authors (docs/models.md of the repository)",
                 "training and accuracy": "not known here"}
    else:
        run = run_of(checkpoint)
        teacher = settings.get("teacher", ["none"])
        if teacher != ["none"]:
            title += f", distilled from {teacher[0]}"
        rows |= training_rows(settings, run)
        rows["top-1"] = accuracy(checkpoint, weights_key, settings, run)
    classes = shortened(student.classes) if student.classes else "not named"
    how = Trained(model, settings, None).preprocessing(student.input_size)
    rows |= {"classes": f"{model.num_classes}: {classes}" if student.classes is None or len(
                 student.classes) > 3 else classes,
             "images": f"RGB, {data.describe_eval(data.eval_transform(**how))}; values in [0, 1], "
                       f"minus {list(model.input_mean)}, divided by {list(model.input_std)}",
             "file": f"`{file_name}`, format {name}; {comparison}"}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    kind = FORMATS[name]
    text = (f"# {title}\n\n| | |\n|---|---|\n{table}\n\n## Loading it\n\nIt runs {kind.place}:\n\n"
            f"```python\n{kind.usage(student, file_name)}\n```\n\n## Licence\n\n{LICENCE}\n")
    if checkpoint is not None:
        kept = {key: value for key, value in settings.items() if key not in OF_THE_MACHINE}
        text += (f"\n## All settings of the run\n\n"
                 f"```yaml\n{yaml.safe_dump(kept, sort_keys=False)}```\n")
    return text


def run_of(checkpoint: Path) -> Run | None:
    """Of the folder that the checkpoint lies in; None where it was taken out of it."""
    try:
        return read_run(checkpoint.absolute().parent)
    except UserError:
        return None


def training_rows(settings: dict[str, Any], run: Run | None) -> dict[str, str]:
    """What taught it, with what, on which images, and how long."""
    teacher, rows = settings.get("teacher", ["none"]), {"teacher": "none"}
    if teacher != ["none"]:
        weights = str(settings.get("teacher_weights", "not known")).replace("\\", "/")
        rows["teacher"] = f"`{' '.join(teacher)}`, weights `{weights.rpartition('/')[2]}`"
        if run is not None and run.teacher_acc1 is not None:
            rows["teacher"] += f", top-1 {run.teacher_acc1:.2f} % on the same validation images"
    losses = [" ".join(spec) for spec in settings.get("loss") or [["not known"]]]
    rows["loss"] = " + ".join(f"`{loss}`" for loss in losses)
    size = settings.get("train_size")
    number = f"{size:,} training images" if isinstance(size, int) else "size not known"
    rows["data"] = f"`{' '.join(settings.get('data_set') or ['not known'])}`, {number}"
    sparsity = settings.get("sparsity")
    known = {"epochs": "epochs", "effective_batch": "images per update", "lr": "peak rate",
             "weight_decay": "weight decay", "aa": "augmentation", "mixup": "mixup",
             "cutmix": "cutmix"}
    words = [f"{settings[key]} {what}" if what in ("epochs", "images per update") else
             f"{what} {settings[key]}" for key, what in known.items() if key in settings]
    rows["recipe"] = ", ".join(words + ([f"sparsity {sparsity}"] if sparsity else []))
    return rows


def accuracy(checkpoint: Path, weights_key: str | None, settings: dict[str, Any],
             run: Run | None) -> str:
    """The top-1 of exactly these weights, of one run; or why it is not known."""
    content = load_file(checkpoint)
    epoch, step, per_epoch = (content.get("epoch"), content.get("step"),
                              settings.get("steps_per_epoch"))
    if weights_key is None and checkpoint.name.endswith("-best-ema.pth"):
        weights_key = "model_ema"
    key = "test_acc1_ema" if weights_key == "model_ema" else "test_acc1"
    if run is None:
        return "not known: args.yaml and log.txt of its run do not lie beside the checkpoint"
    if not all(type(number) is int for number in (epoch, step, per_epoch)):
        return "not known: the checkpoint does not say how far its run had come"
    records = [record for record in run.records if record.get("epoch") == epoch - 1]
    if not records or records[0].get(key) is None or step != epoch * per_epoch:
        return "not known: log.txt has no evaluation of these weights"
    return (f"{records[0][key]:.2f} % on the validation images after epoch {epoch} of "
            f"{settings.get('epochs')} (n = 1 run, seed {settings.get('seed')}"
            f"{', averaged weights' if key.endswith('ema') else ''})")
