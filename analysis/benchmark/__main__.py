"""Times side by side, each measured in one run on one machine.

    python -m analysis.benchmark masking        # an update of sparse training against a dense one
    python -m analysis.benchmark operator       # the depthwise branches of a SLaK
    python -m analysis.benchmark teacher        # inference of the folded, frozen teacher
    python -m analysis.benchmark step           # a whole step of training or distillation
    python -m analysis.benchmark loader --data-path FOLDER    # decoding and augmentation

Each has flags of its own: python -m analysis.benchmark operator --help
"""
import sys

import torch

from analysis.benchmark import loader, masking, operator, step, teacher
from utils.registry import UserError, did_you_mean

COMMANDS = {"masking": masking, "operator": operator, "teacher": teacher,
            "step": step, "loader": loader}


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    name = words[0] if words else "nothing"
    try:
        if name not in COMMANDS:
            raise UserError(f"the first word says what to measure: {', '.join(COMMANDS)}; got "
                            f"{name!r}.{did_you_mean(name, COMMANDS)}")
        COMMANDS[name].main(words[1:])
    except UserError as error:
        print(f"analysis.benchmark: error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"analysis.benchmark: error: the GPU's memory is full "
              f"({str(error).splitlines()[0]}). Lower --batch-size.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
