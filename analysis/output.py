"""What an analysis leaves behind: tables, arrays, pictures. Nothing is overwritten unasked."""
import csv
import io
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.checkpoint import write_atomically, write_text_atomically
from utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_PICTURES = ("no pictures, since matplotlib is not installed: pip install matplotlib. Arrays and "
               "tables are written all the same.")


def figure_class() -> "type[Figure] | None":
    """Matplotlib's figure, which draws without a screen; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure


def new_files(paths: Sequence[Path], overwrite: bool) -> None:
    """Makes the folders of `paths`. Raises UserError where files are there already and would be
    lost; meant for before the work."""
    there = [path for path in paths if path.exists()]
    folders = [path for path in there if path.is_dir()]
    if folders or (there and not overwrite):
        raise UserError(f"{', '.join(map(str, (folders or there)[:3]))} "
                        f"{'is a folder' if folders else 'would be overwritten'}. Give another "
                        f"--out{'' if folders else ', or add --overwrite'}.")
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {path.parent} ({error.strerror})."
                        ) from None


def save_array(array: np.ndarray, path: Path) -> None:
    write_atomically(lambda file: np.save(file, array), path)


def save_figure(figure: "Figure", path: Path) -> None:
    write_atomically(lambda file: figure.savefig(file, format="png", dpi=150), path)


def save_tables(text: str, rows: Sequence[Any], base: Path) -> None:
    """`text` to base.md, `rows` (of one NamedTuple) to base.csv."""
    write_text_atomically(text + "\n", base.with_suffix(".md"))
    write_text_atomically(csv_text(rows), base.with_suffix(".csv"))


def csv_text(rows: Sequence[Any], digits: int | None = None) -> str:
    """NamedTuples of one kind under the names of their fields, at least one; an empty cell for
    None. `digits`: decimals of numbers; None: all that they have."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(type(rows[0])._fields)
    for row in rows:
        writer.writerow([round(value, digits) if digits is not None and isinstance(value, float)
                         else value for value in row])
    return file.getvalue()


def in_lines(label: str, width: int) -> str:
    """`label` broken into lines, for a picture: no character of it is taken for mathematics."""
    return textwrap.fill(label, width).replace("$", r"\$")


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], num_words: int = 1) -> str:
    """The first `num_words` columns aligned left and the others right."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
             for cells in (heads, *rows)]
    rule = ["---"] * num_words + ["---:"] * (len(heads) - num_words)
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def file_name(label: str) -> str:
    """`label` without what a file name should not have."""
    return re.sub(r"[^\w.=-]+", "_", label).strip("._") or "network"
