"""Weights of other programs: containers, prefixes, formats, odd tensors, damaged files. What is the
same network under other names gives the same figures or is refused."""
import argparse
import pickle
import random
import warnings
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.campaign.base import TINY, damage
from tests.campaign.checkpoints import change_somewhere, figures, odd_values
from tests.campaign.process import Result, judge, run

CONTAINERS = ["model", "state_dict", "model_ema", "net", "module", "model_state_dict", "weights",
              "params", "student", "ema", "teacher", "x", "state_dict_ema", "generator"]
PREFIXES = ["module.", "_orig_mod.", "student.", "backbone.", "model.", "encoder.", "net.",
            "x.y.z.", "module._orig_mod.", "_orig_mod.module.", "0.", "ü."]
NAMED = "--model resnet_nano --num-classes 3 --input-size 32 "
USES = {
    "eval": ("eval", (NAMED + "--num-workers 0 --device cpu --data-path ../base/images --weights"
                      ).split()),
    "student": ("train_kd", [*TINY, "--dry-run", "--output-dir", "new", "--student-weights"]),
    "teacher": ("train_kd", [*TINY, "--epochs", "1", "--output-dir", "new", "--teacher",
                             "resnet_nano", "--teacher-weights"]),
    "complexity": ("analysis.complexity", (NAMED + "--weights").split()),
}


def weights(rng: random.Random, folder: Path, base: Path) -> Result:
    use, kind = rng.choice(["eval", "eval", *USES]), rng.choice([same, same, odd, odd, odd, other])
    path = folder / rng.choice(["w.pth"] * 6 + ["w.pt", "w.bin", "w", "w.safetensors", "w.ckpt"])
    label = f"{use}, {kind.__name__}: {kind(own_weights(base), path, rng)}"
    if path.is_file() and path.stat().st_size and rng.random() < 0.2:
        content, what = damage(path.read_bytes(), rng)
        path.write_bytes(content)
        # Nobody can vouch for the values in a file without sums, so its figures are not compared.
        kind, label = other, f"{label}, {what}"
    result = judge(run(USES[use][0], [*USES[use][1], path.name], folder), label)
    if result.right and use == "eval":
        got = figures((folder / "output.log").read_text())
        if any("nan" in line for line in got):
            return Result(fault=f"figures of NaN weights: {got}", label=label)
        if kind is same and got != whole_figures(base):
            return Result(fault=f"other figures without a word: {got}", label=label)
    return result


def own_weights(base: Path) -> dict[str, Tensor]:
    return torch.load(base / "run" / "checkpoint-last.pth", weights_only=True)["model"]


@cache
def whole_figures(base: Path) -> list[str]:
    folder = base.parent / "whole-weights"
    folder.mkdir()
    torch.save(own_weights(base), folder / "w.pth")
    return figures(run("eval", [*USES["eval"][1], "w.pth"], folder).output)


def same(state: dict[str, Tensor], path: Path, rng: random.Random) -> str:
    """The same network as another program would save it."""
    label = rng.choices(PREFIXES, k=rng.choice([0, 1, 1, 2]))
    for prefix in label:
        state = {prefix + name: value for name, value in state.items()}
    if rng.random() < 0.2:
        state = OrderedDict((name, nn.Parameter(value, requires_grad=value.is_floating_point()))
                            for name, value in state.items())
        label.append("parameters")
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file
        save_file({name: value.detach().contiguous() for name, value in state.items()}, path)
        return str(label)
    content: Any = state
    for key in rng.sample(CONTAINERS, rng.choice([0, 1, 1, 1, 2])):
        content = {**extras(rng), key: content}
        label.append(f"in {key}")
    write(content, path, rng)
    return str(label)


def extras(rng: random.Random) -> dict[str, Any]:
    """What programs keep beside their weights."""
    known = {"epoch": 3, "acc": 81.5, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
             "args": argparse.Namespace(lr=0.1), "best": np.float64(7.5), "lr_scheduler": {},
             "array": np.arange(3), "meta": {"env": "x", "classes": ["a"]}, "amp": None,
             "version": 2, "metrics": [torch.tensor(1.0)], "config": {"depths": (1, 2)},
             "dtype": torch.float32, "rng": torch.get_rng_state(), "when": OrderedDict(a=1)}
    return {key: known[key] for key in rng.sample(list(known), rng.randint(0, 3))}


def odd(state: dict[str, Tensor], path: Path, rng: random.Random) -> str:
    """Values and names that do not belong there."""
    content: Any = dict(state)
    label = [change_somewhere(content, rng) for _ in range(rng.choice([1, 1, 2, 4]))]
    if rng.random() < 0.5:
        content = {rng.choice(CONTAINERS): content}
        if rng.random() < 0.3:
            key, kind = rng.choice(CONTAINERS), rng.choice(list(odd_values()))
            content[key] = odd_values()[kind]
            label.append(f"{key}: {kind}")
    write(content, path, rng)
    return ", ".join(label)


def other(state: dict[str, Tensor], path: Path, rng: random.Random) -> str:
    """Whole files that hold something else."""
    value, nested = rng.choice(list(odd_values().values())), {"a": torch.ones(1)}
    for _ in range(300):
        nested = {"model": nested}
    kind, content = rng.choice([
        ("value", value), ("list", [state, value]), ("module", nn.Linear(2, 2)), ("deep", nested),
        ("script", None), ("folder", None), ("npz", None),
        ("pickle", pickle.dumps({"model": {"a": 1}}, rng.randint(0, 5))), ("empty", b""),
        ("page", b"<html>not found</html>"), ("zeros", bytes(100)),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("header", rng.choice([0, 1, 2 ** 20, 2 ** 63 - 1, 2 ** 64 - 1]).to_bytes(8, "little")
         + b'{"a":{"dtype":"F32","shape":[9]}}')])
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif kind == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this form is deprecated
            torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, a=np.ones(3))
    else:
        write(content, path, rng)
    return kind


def write(content: Any, path: Path, rng: random.Random) -> None:
    """In one of torch's two formats; nothing where torch does not write such a thing."""
    try:
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.8)
    except Exception:
        path.write_bytes(b"")
