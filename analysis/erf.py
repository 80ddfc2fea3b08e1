"""The effective receptive field of networks side by side: maps, heat maps, a table of extents.

    python -m analysis.erf --checkpoint runs/A/checkpoint-best.pth runs/B/checkpoint-best.pth \\
        --data-path IMAGENET --out erf
    python -m analysis.erf --data-path IMAGENET --out erf \\
        --model slak_t --weights published --model convnext_t --weights published
    python -m analysis.erf --matrix SLaK-T_51.npy --out erf        # a published map
"""
import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import models
from analysis.erf_report import draw, report, table_rows
from analysis.output import (
    NO_PICTURES,
    figure_class,
    file_name,
    new_files,
    save_array,
    save_figure,
    save_tables,
)
from analysis.receptive_field import Field, measure
from analysis.subjects import (
    Subject,
    add_picture_flags,
    add_subject_flags,
    by_group,
    check_common,
    check_fits,
    load_subjects,
    refuse_flags,
    select,
    told_apart,
    validation_pictures,
)
from utils.config import Parser
from utils.distributed import run_program, setup
from utils.errors import UserError, one_line
from utils.log import progress, say
from utils.registry import parse_spec
from utils.rng import fold_seed


def build_parser() -> Parser:
    parser = Parser(prog="analysis.erf", description=__doc__.split("\n")[0])
    add_subject_flags(parser)
    add_picture_flags(parser)
    flag = parser.add_argument
    flag("--matrix", nargs="+", default=[], type=Path, metavar="NPY",
         help="contribution maps (H, W) from files, this program's or published ones")
    flag("--images", type=int, default=50, help="validation images")
    flag("--spread", action=argparse.BooleanOptionalAction, default=False,
         help="take them at equal distances, not the first ones (of one class, often)")
    flag("--size", type=int, default=1024, help="pixels; images are warped to that square")
    flag("--batch-size", type=int, default=1, help="images at a time")
    flag("--control", action=argparse.BooleanOptionalAction, default=True,
         help="also measure each architecture with random weights")
    flag("--seed", type=int, default=0, help="of random weights where no run says its own")
    flag("--out", type=Path, default=Path("erf"), metavar="FOLDER", help="where everything goes")
    flag("--overwrite", action=argparse.BooleanOptionalAction, default=False,
         help="replace files of the same names there")
    return parser


def refuse_useless(given: Sequence[str], has_models: bool, has_networks: bool) -> None:
    if not has_networks and "matrix" in given:
        measuring = {"images", "spread", "size", "batch_size", "control", "seed", "data_set",
                     "data_path", "num_workers", "skip_bad_images", "device", "weights_key"}
        refuse_flags(given, measuring, "on --matrix alone, which is measured already")
    if not has_models:
        refuse_flags(given, {"num_classes"}, "without --model: a checkpoint knows its classes")


def controls(subjects: Sequence[Subject], seed: int) -> list[Subject]:
    """Each architecture of `subjects` with the random weights that a run starts from, once for each
    seed of their runs; `seed` where there is no run."""
    keys = dict.fromkeys((tuple(subject.words), subject.model.num_classes,
                          subject.settings.get("seed", seed)) for subject in subjects)
    networks = dict.fromkeys(key[:2] for key in keys)
    names = dict(zip(networks, told_apart([f"{words[0]}, untrained" for words, _ in networks])))
    groups = [names[key[:2]] for key in keys]
    taken = {subject.group for subject in subjects} & {*groups}
    if taken:
        raise UserError(f"--labels: {min(taken)!r} is what the control is called; choose another "
                        "name, or --no-control.")
    found = []
    for (words, num_classes, seed_), label, group in zip(keys, told_apart(groups), groups):
        name, options = parse_spec(list(words), "--model")
        torch.manual_seed(fold_seed(seed_, "student"))
        model = models.create_model(name, num_classes, **options)
        found.append(Subject(label, group, list(words), model, {}))
    return found


def check_sizes(subjects: Sequence[Subject], size: int) -> None:
    for subject in subjects:
        if subject.model.input_size not in (None, size):
            raise UserError(f"{subject.label} takes {subject.model.input_size} px only. Measure "
                            f"all networks there, with --size {subject.model.input_size}: extents "
                            "at different sizes cannot be compared.")
    check_fits(subjects, size, "--size")


def measure_network(subject: Subject, loader: data.Loader, device: torch.device) -> Field:
    model = subject.model.eval().requires_grad_(False).fold().to(
        device, memory_format=torch.channels_last)
    prepare = data.Preparation(model.input_mean, model.input_std, device)

    def batches() -> Iterator[Tensor]:
        with progress(subject.label, len(loader)) as bar:
            for pictures, _, indices in loader:
                images = prepare(pictures.to(device, memory_format=torch.channels_last))
                yield images[(indices >= 0).to(device)]
                bar.update()

    try:
        return measure(model, batches())
    except UserError as error:
        raise UserError(f"{subject.label}: {error} Are these the weights of a trained network?"
                        ) from None


def array_names(subjects: Sequence[Subject]) -> list[str]:
    return [f"{name}.npy" for name in told_apart([file_name(subject.label)
                                                  for subject in subjects])]


def read_matrix(path: Path) -> np.ndarray:
    """A contribution map. Raises UserError for what is none."""
    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--matrix {path} is no readable .npy file ({one_line(error)}).") from None
    if not (isinstance(matrix, np.ndarray) and matrix.ndim == 2 and matrix.size
            and np.issubdtype(matrix.dtype, np.number) and np.isfinite(matrix).all()
            and matrix.min() >= 0 and matrix.max() > 0):
        shape = getattr(matrix, "shape", "several arrays")
        raise UserError(f"--matrix {path} must be one map (H, W) of finite numbers of at least 0, "
                        f"not all of them 0; got {shape}, {getattr(matrix, 'dtype', '')}.")
    return matrix


def run(subjects: Sequence[Subject], matrices: Sequence[tuple[str, np.ndarray]],
        loader: data.Loader | None, *, device: torch.device, out: Path, spread: bool) -> None:
    """Measure, print the table, write everything below `out`."""
    fields = []
    for subject, name in zip(subjects, array_names(subjects)):
        fields.append(measure_network(subject, loader, device))
        save_array(fields[-1].contribution, out / name)
    fields += [Field.of_matrix(matrix) for _, matrix in matrices]
    groups = [subject.group for subject in subjects] + [name for name, _ in matrices]
    rows = [row for label, group, field in zip(told_apart(groups), groups, fields)
            for row in table_rows(label, group, field)]
    text = report(rows, spread)
    save_tables(text, rows, out / "erf")
    say(text)
    if figure_class() is None:
        return say(f"{NO_PICTURES} Afterwards: python -m analysis.erf --matrix {out}/*.npy "
                   f"--out {out}-picture")
    panels = {group if len(found) == 1 else f"{group}, first of {len(found)}":
              found[0].contribution for group, found in by_group(fields, groups).items()}
    save_figure(draw(panels), out / "erf.png")
    say(f"maps, table and picture are in {out}")


def main(argv: list[str] | None = None) -> int:
    def program() -> int:
        args: argparse.Namespace = build_parser().parse(sys.argv[1:] if argv is None else argv)
        refuse_useless(args.given, bool(args.model), bool(args.model or args.checkpoint))
        device = setup(args.device)
        check_common({"--images": (args.images, 1), "--size": (args.size, 1),
                      "--batch-size": (args.batch_size, 1), "--num-workers": (args.num_workers, 0)})
        subjects = load_subjects(
            args.checkpoint, args.model, args.weights, weights_key=args.weights_key,
            num_classes=args.num_classes, labels=args.labels, seed=args.seed,
            others=len(args.matrix))
        if not subjects and not args.matrix:
            raise UserError("nothing to measure: give --checkpoint FILES, --model NAME with "
                            "--weights SOURCE, or --matrix FILES.")
        names = args.labels[len(subjects):] if args.labels else told_apart(
            [path.stem for path in args.matrix])
        matrices = list(zip(names, map(read_matrix, args.matrix)))
        check_sizes(subjects, args.size)
        loader = None
        if subjects:
            source = select(validation_pictures(args.data_set, args.data_path, subjects),
                            args.images, args.spread)
            loader = data.eval_loader(
                source, data.warp_transform(args.size), batch_size=args.batch_size,
                num_workers=args.num_workers, skip_bad_images=args.skip_bad_images)
            subjects += controls(subjects, args.seed) if args.control else []
        new_files([args.out / name for name in [*array_names(subjects), "erf.md", "erf.csv",
                                                "erf.png"]], args.overwrite)
        with closing(loader) if loader else nullcontext():
            run(subjects, matrices, loader, device=device, out=args.out, spread=args.spread)
        return 0

    return run_program("analysis.erf", program)


if __name__ == "__main__":
    sys.exit(main())
