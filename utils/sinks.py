"""Where a run's figures go beside log.txt: TensorBoard's events, Weights & Biases. Both packages
are optional; the step of every figure is the number of updates done."""
import importlib
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from utils.distributed import is_main
from utils.files import write_text_atomically
from utils.registry import UserError, one_line


class Sink(Protocol):
    """A place of one run, opened with its folder, its settings and the updates done so far. Figures
    of later updates, which a killed run may have left there, do not count any more."""

    def add(self, values: Mapping[str, float], step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Events in the run's folder tensorboard/."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        module = package("tensorboard")
        self.writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        lines = yaml.safe_dump(dict(settings), sort_keys=False).splitlines()
        self.writer.add_text("settings", "\n".join(f"    {line}" for line in lines), step)
        values = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                  for name, value in settings.items()}
        # What the tab HPARAMS compares runs by; add_hparams would make a second run of it.
        experiment, start, _ = module.summary.hparams(values, {"test_acc1": math.nan})
        self.writer.file_writer.add_summary(experiment)
        self.writer.file_writer.add_summary(start)

    def add(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, called as its folder, and continued with it: its id lies there.
    Project, account and mode are those of wandb's own settings (WANDB_PROJECT, WANDB_MODE=offline,
    wandb login)."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        path = folder / "wandb-id.txt"
        if step == 0 or not path.is_file():
            write_text_atomically(f"{secrets.token_hex(8)}\n", path)
        try:
            self.run = package("wandb").init(
                id=path.read_text().strip(), name=folder.resolve().name, dir=str(folder),
                config=dict(settings), resume="allow")
        except Exception as error:  # its own kinds: no login, no network, no server
            raise UserError(f"wandb did not start ({one_line(error)[:300]}). Try wandb login or "
                            "WANDB_MODE=offline, or leave it out of --log-to.") from None

    def add(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)  # it takes no step before its last one: as is meant

    def flush(self) -> None:
        pass  # it sends in a process of its own

    def close(self) -> None:
        self.run.finish()


SINKS = {"tensorboard": TensorBoard, "wandb": WandB}
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def package(name: str) -> Any:
    """The module of a sink. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(MODULES[name])
    except ImportError:
        raise UserError(f"--log-to {name} needs the package {name}: pip install {name}, or leave "
                        f"{name} out.") from None


def sink_names(log_to: Sequence[str] | None, tensorboard: bool) -> list[str]:
    """Each once, of both flags."""
    return list(dict.fromkeys([*(log_to or []), *["tensorboard"] * tensorboard]))


def check_sinks(names: Sequence[str]) -> None:
    """Raises UserError where a package is missing; meant for before the run folder exists."""
    for name in names:
        package(name)


def open_sinks(names: Sequence[str], folder: Path, settings: Mapping[str, Any],
               step: int) -> list[Sink]:
    """Those named, on the first process; none on the others."""
    return [SINKS[name](folder, settings, step) for name in names if is_main()]
