"""Names of classes: which outputs of one network are the classes of a data set, or of another."""
from collections.abc import Sequence
from pathlib import Path

from utils.registry import UserError

WNIDS = Path(__file__).parents[1] / "data" / "imagenet_wnids.txt"

LONGEST = 80  # letters


def imagenet_wnids() -> list[str]:
    """Of ImageNet's 1000 classes, by label."""
    return WNIDS.read_text().split()


def shown(name: object) -> str:
    """A name from a file, of one line, of a length that a sentence can hold, and printable."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def shortened(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:3])) + (f", ... ({len(names)})" if len(names) > 3 else "")


def are_numbers(names: Sequence[str]) -> bool:
    """Whether they are 0, 1, 2, ... or 000, 001, 002, ...: the labels themselves."""
    return all(name.isascii() and name.isdecimal() and int(name) == label
               for label, name in enumerate(names))


def match(have: Sequence[str] | None, number: int, wanted: Sequence[str]) -> list[int]:
    """Of each of the classes `wanted`, the label that a network gives it which has `number`
    classes, called `have` (None: it does not name them).

    Unnamed classes are ImageNet's where they are 1000 and the wanted ones are of its wnids, else
    the wanted ones in their order where these are as many. Numbers 0, 1, 2, ... are the labels of
    as many unnamed or ImageNet classes. Raises UserError, in words that follow those for the
    network, where a class is missing or nothing is known.
    """
    wnids = imagenet_wnids()
    if have is None and number == len(wnids) and set(wanted) <= set(wnids):
        have = wnids
    if number == len(wanted) and (have is None or (have == wnids and are_numbers(wanted))):
        return list(range(number))
    if have is None:
        hint = " (ImageNet's would be known by folders of its wnids, n01440764)"
        raise UserError(f"has {number} classes and does not name them"
                        f"{hint if number == len(wnids) else ''}, and the data has "
                        f"{len(wanted)} ({shortened(wanted)})")
    label_of = {name: label for label, name in enumerate(have)}
    missing = [name for name in wanted if name not in label_of]
    if missing:
        raise UserError(f"knows {number} classes ({shortened(have)}), and {len(missing)} of the "
                        f"data's {len(wanted)} are not among them: {shortened(missing)}")
    return [label_of[name] for name in wanted]
