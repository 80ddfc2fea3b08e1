"""Times and losses side by side, each measured in one run on one machine.

    python -m analysis.benchmark masking        # an update of sparse training against a dense one
    python -m analysis.benchmark operator       # the depthwise branches of a SLaK
    python -m analysis.benchmark teacher        # inference of the folded, frozen teacher
    python -m analysis.benchmark step           # a whole step of training or distillation
    python -m analysis.benchmark loader --data-path FOLDER    # decoding and augmentation
    python -m analysis.benchmark data --data-path FOLDER    # steps fed from disk and from memory
    python -m analysis.benchmark kept_logits --checkpoint TEACHER STUDENT --data-path FOLDER
                                                # losses of a teacher's likeliest classes only

Each has flags of its own: python -m analysis.benchmark operator --help
"""
import sys

from analysis.benchmark import feeding, kept_logits, loader, masking, operator, step, teacher
from utils.registry import did_you_mean

COMMANDS = {"masking": masking, "operator": operator, "teacher": teacher,
            "step": step, "loader": loader, "data": feeding,
            "kept_logits": kept_logits}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else "nothing"
    if name in COMMANDS:
        return COMMANDS[name].main(argv[1:])
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    print(f"analysis.benchmark: error: the first word says what to measure: {', '.join(COMMANDS)}; "
          f"got {name!r}.{did_you_mean(name, COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
