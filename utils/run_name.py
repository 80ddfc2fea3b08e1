"""The name of a run's folder. Needs no PyTorch, so that scripts may ask for it:

    python -m utils.run_name slak_t "resnet50 zero_init_residual=true" nkd 120 0
"""
import re
import sys


def run_name(teacher: list[str], student: list[str], losses: list[list[str]], epochs: int,
             seed: int, sparsity: float = 0.0) -> str:
    """teacher-student-loss-epochs, each with the options given to it; after the student its
    sparsity unless 0, at the end the seed unless 0."""
    words = [teacher, student, [word for loss in losses for word in loss]]
    parts = ["_".join(part) for part in words] + [f"{epochs}ep"] + [f"seed{seed}"] * (seed != 0)
    parts[1] += f"_sparsity{sparsity:g}" * (sparsity != 0)
    return re.sub(r"[^\w.-]+", ".", "-".join(parts).replace("=", ""))


if __name__ == "__main__":
    # Teacher, student and one loss, each a name and its options in one word; epochs; seeds.
    teacher, student, loss = (words.split() for words in sys.argv[1:4])
    for seed in sys.argv[5:]:
        print(run_name(teacher, student, [loss], int(sys.argv[4]), int(seed)))
