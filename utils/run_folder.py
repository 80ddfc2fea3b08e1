"""The folder of a run: what a start may continue, and what it must not touch."""
from pathlib import Path
from typing import Any

from utils.checkpoint import describe_changes, keep_last, load_file, save_atomically
from utils.distributed import barrier, gather_objects, is_main
from utils.errors import UserError, one_line

LAST = "checkpoint-last.pth"

# What a resumed run may change: where and how it runs and reports, not what it computes. How many
# processes share an effective batch is free as long as the product is the same.
FREE_ON_RESUME = frozenset({
    "config", "output_dir", "resume", "auto_resume", "device", "num_workers", "print_every",
    "save_freq", "save_num", "save_every_steps", "tensorboard", "skip_bad_images", "data_path",
    "student_weights", "student_weights_key", "compile", "channels_last", "batch_size",
    "accum_steps", "world_size", "git", "dry_run", "large_kernel", "teacher_stream",
    "log_kd_health"})


# What a run starts from:
# 1. --resume FILE;
# 2. without it, the run folder's own checkpoint-last.pth, unless --no-auto-resume;
# 3. without either, --student-weights;
# 4. without that, random weights.
# --teacher-weights has no part in it. Nothing already in the folder is ever overwritten by a run
# that does not continue it.
def find_checkpoint(folder: Path, resume: Path | None, auto_resume: bool,
                    settings: dict[str, Any], defaults: dict[str, Any]
                    ) -> tuple[Path, dict[str, Any]] | None:
    """The file to continue and its content, checked against this start's `settings`; None for a
    new run. A setting that the file does not know had its default."""
    last = folder / LAST
    remains = sorted(path.name for path in folder.glob("*")
                     if path.suffix == ".pth" or path.name == "log.txt")
    if resume is not None:
        if remains and resume.resolve().parent != folder.resolve():
            raise UserError(f"{folder} holds another run, which --resume {resume} would overwrite. "
                            "Set another --output-dir.")
        path = resume
    elif not last.exists():
        if remains:
            raise UserError(f"{folder} holds {', '.join(remains)} of another run but no {LAST}. "
                            "Continue one with --resume, or set another --output-dir.")
        return None
    elif auto_resume:
        path = last
    else:
        raise UserError(f"{folder} already holds a run. Leave out --no-auto-resume to continue it, "
                        "or set another --output-dir.")
    try:
        saved = load_file(path)
    except UserError as error:
        raise UserError(f"{error} Continue another file with --resume, or set another "
                        "--output-dir.") from None
    if "optimizer" not in saved or not isinstance(saved.get("args"), dict):
        raise UserError(f"{path} is not a checkpoint of this program's training. Weights alone are "
                        "loaded with --student-weights.")
    changes = describe_changes({**defaults, **saved["args"]}, settings, FREE_ON_RESUME)
    if changes:
        raise UserError(f"{path} is from a run with other settings ({'; '.join(changes)}). Repeat "
                        "its settings to continue it, or set another --output-dir.")
    return path, saved


def restore(state: Any, path: Path, saved: dict[str, Any]) -> None:
    """Give a TrainState what the file at `path` saved of one. Raises UserError when it cannot."""
    try:
        if state.sparsity is not None and saved.get("sparsity") is None:
            raise ValueError("it holds no masks, and new ones would zero weights that were trained")
        state.load_state_dict(saved)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not hold the state of this run ({one_line(error)}). Continue "
                        "another file with --resume, or set another --output-dir.") from None


def checkpoint_names(epoch: int, is_last: bool, save_freq: int, best: list[str]) -> list[str]:
    """The files that the state after `epoch` goes to. `best` has '' when the student and '_ema'
    when its average was never as good as now."""
    names = [LAST]
    if save_freq and ((epoch + 1) % save_freq == 0 or is_last):
        names.append(f"checkpoint-{epoch}.pth")
    return names + [f"checkpoint-best{suffix.replace('_', '-')}.pth" for suffix in best]


def save(content: dict[str, Any], folder: Path, names: list[str], keep: int) -> None:
    """Write `content` to each of `names`, and delete all but the `keep` newest of the numbered
    checkpoints (0: none). Called by all processes; the first one writes."""
    if is_main():
        for name in names:
            save_atomically(content, folder / name)
        keep_last(folder, "checkpoint-[0-9]*.pth", keep)
    barrier()


def check_same_start(saved: tuple[Path, dict] | None, folder: Path) -> None:
    """All processes continue the same update, or all start afresh."""
    steps = gather_objects(saved[1]["step"] if saved else None)
    if len(set(steps)) > 1:
        raise UserError(f"the processes do not see the same checkpoint in {folder} (updates "
                        f"{steps}). --output-dir must be on storage that all machines share.")
