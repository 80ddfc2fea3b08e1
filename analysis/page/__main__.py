"""One HTML file to see and compare runs: settings that differ, curves, table, predictions.

    python -m analysis.page runs/* --out page.html
    python -m analysis.page runs/A runs/B --data-path IMAGENET --out page.html
    python -m analysis.page runs/* --predictions teacher.npz student.npz --erf erf --out page.html

It holds all that it shows and asks nothing of the network, so it can be mailed or kept beside the
runs. With --data-path (or --data-set) the students and their teachers are evaluated on the
validation images; --predictions takes what eval.py saved instead.
"""
import argparse
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from string import Template

from PIL import Image, ImageOps

import data
from analysis.common import (
    Run,
    add_image_flags,
    check_new,
    read_runs,
    select,
    single_process,
    unique_labels,
    validation_images,
)
from analysis.page import predictions, sections
from analysis.page.html import Section, escape
from analysis.page.predictions import Predictions
from utils.config import Parser, at_least, between, program
from utils.files import write_text_atomically
from utils.registry import UserError

TEMPLATE = Path(__file__).with_name("template.html")
MARK = "<!-- written by python -m analysis.page -->"


def build_parser() -> Parser:
    parser = Parser(prog="analysis.page", description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("runs", nargs="+", type=Path, help="run folders")
    flag("--labels", nargs="+", default=None, metavar="NAME", help="names for the runs, in order")
    flag("--out", type=Path, default=Path("page.html"), metavar="FILE", help="the page")
    flag("--overwrite", action=argparse.BooleanOptionalAction, default=False,
         help="replace a file of that name that is no such page")
    add_image_flags(parser)
    flag("--images", type=at_least(1), help="how many validation images to evaluate; default: all")
    flag("--batch-size", type=at_least(1), default=96, help="images at a time")
    flag("--weights-from", default="checkpoint-last.pth", metavar="NAME",
         help="checkpoint of each run to evaluate; the table is of the last epoch, too")
    flag("--predictions", nargs="+", default=[], type=Path, metavar="NPZ",
         help="of eval.py --predictions, instead of evaluating; the first, a teacher say, is "
         "compared with each of the others")
    flag("--thumbnails", type=between(0, 48), default=12, help="images a network and a pair")
    flag("--resamples", type=between(100, 10 ** 6), default=10_000, help="of the bootstrap")
    flag("--seed", type=between(0, 2 ** 63 - 1), default=0, help="of the bootstrap")
    flag("--erf", type=Path, metavar="FOLDER", help="what analysis.erf wrote; by default the "
         "folder erf beside the runs, where there is one")
    return parser


@program("analysis.page", build_parser)
def main(args: argparse.Namespace) -> int:
    if not is_own(args.out):
        check_new([args.out], args.overwrite)
    device = single_process(args.device)
    all_runs, unreadable = read_runs(args.runs)
    labels = args.labels or unique_labels([run.folder.resolve().name for run in all_runs])
    if len(set(labels)) != len(all_runs):
        raise UserError(f"--labels needs {len(all_runs)} different names, one for each run that "
                        f"could be read; got {', '.join(labels)}.")
    runs = dict(zip(labels, all_runs))
    missing = [f"left out: {reason}" for reason in unreadable]

    # Predictions: from files, or of the runs' networks; and which to compare.
    source = None
    if args.data_path is not None or args.data_set is not None:
        data_set = args.data_set or all_runs[0].args.get("data_set")
        source = validation_images(data_set, args.data_path, [])
        if args.images is not None:
            source = select(source, args.images, args.spread)
    found: list[Predictions] = []
    pairs: list[tuple[str, str]] = []
    if args.predictions:
        names = unique_labels([path.stem for path in args.predictions])
        found = [predictions.read_predictions(path, name)
                 for path, name in zip(args.predictions, names)]
        pairs = [(names[0], name) for name in names[1:]]
    elif source is not None:
        students, left_out = predictions.load_students(runs, args.weights_from, source.classes)
        teachers, pairs, more = predictions.load_teachers(runs, students, source.classes)
        missing += left_out + more
        found = predictions.evaluate(
            [*students, *teachers], source, device, batch_size=args.batch_size,
            num_workers=args.num_workers, skip_bad_images=args.skip_bad_images)

    # The page.
    shown = [sections.settings_section(runs), sections.curves_section(runs),
             sections.report_section(all_runs, unreadable)]
    if found:
        found = predictions.on_common_images(found)
        words = dict(zip(found[0].classes, data.class_words(found[0].classes)))
        find_image = image_finder(source)
        shown += [sections.accuracy_section(found, words, args.resamples, args.seed),
                  sections.confusion_section(found, words),
                  sections.mistakes_section(found, words, args.thumbnails, find_image)]
        by_label = {network.label: network for network in found}
        if pairs:
            shown.append(sections.disagreement_section(
                [(by_label[first], by_label[other]) for first, other in pairs], words,
                args.thumbnails, find_image))
        else:
            missing.append("disagreement of student and teacher: needs a run with a teacher whose "
                           "weights are found, or two files for --predictions")
    else:
        missing.append("predictions (confusions, mistakes, disagreement with the teacher, paired "
                       "bootstrap): --data-path DIR evaluates the runs, --predictions NPZ takes "
                       "what eval.py saved")
    fields = args.erf or fields_beside(all_runs)
    if fields is not None:
        shown.append(sections.fields_section(fields))
    else:
        missing.append("receptive fields: run python -m analysis.erf, then give its folder with "
                       "--erf")
    if missing:
        shown.append(sections.missing_section(missing))
    text = page(f"{len(runs)} run{'s' * (len(runs) > 1)}: {', '.join(labels)}", shown)
    write_text_atomically(text, args.out)
    print(f"{args.out}: {', '.join(section.title.lower() for section in shown)} "
          f"({len(text.encode()) / 2 ** 20:.2f} MiB)")
    return 0


def page(title: str, shown: Sequence[Section]) -> str:
    """The whole file."""
    links = "".join(f'<li><a href="#{section.anchor}">{escape(section.title)}</a></li>'
                    for section in shown)
    parts = [f'<header><h1>{escape(title)}</h1></header><nav aria-label="sections"><ul>{links}</ul>'
             "</nav><main>"]
    parts += [f'<section aria-labelledby="{section.anchor}"><h2 id="{section.anchor}">'
              f"{escape(section.title)}</h2>{section.body}</section>" for section in shown]
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title), body="\n".join([*parts, "</main>"]))
    return f"{text.rstrip()}\n{MARK}\n"


def is_own(path: Path) -> bool:
    """Whether an earlier page lies there."""
    return path.is_file() and MARK.encode() in path.read_bytes()[-200:]


def fields_beside(runs: Sequence[Run]) -> Path | None:
    """The folder `erf` that analysis.erf wrote beside a run."""
    folders = [run.folder.resolve().parent / "erf" for run in runs]
    return next((folder for folder in folders if (folder / "erf.csv").is_file()), None)


def image_finder(source: data.ImageSource | None) -> sections.FindImage:
    """Gives small images by their names: those of a source, else files of that name."""
    place_of = {source.name_of(i): i for i in range(len(source))} if source else {}
    ends = {"/".join(Path(name).parts[-2:]): i for name, i in place_of.items()}

    @lru_cache(maxsize=512)
    def find(name: str) -> Image.Image | None:
        place = place_of.get(name, ends.get("/".join(Path(name).parts[-2:])))
        try:
            if place is not None:
                image = source.load(place)[0]
            elif Path(name).is_file():
                image = data.read_image(name)
            else:
                return None
            image = data.to_rgb(image)
        except OSError:
            return None
        return ImageOps.contain(image, (sections.THUMBNAIL, sections.THUMBNAIL))
    return find


if __name__ == "__main__":
    sys.exit(main())
