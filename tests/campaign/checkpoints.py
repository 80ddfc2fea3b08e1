"""Damaged checkpoints, and whole ones with wrong insides. A damaged file that is continued or
evaluated all the same must give what the whole one gives."""
import random
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.campaign.base import TWO_EPOCHS, damage
from tests.campaign.kills import compare
from tests.campaign.process import Result, judge, run
from utils.checkpoint import save_atomically
from utils.content import CHECKSUMS

LAST = "run/checkpoint-last.pth"
EVAL = f"--checkpoint {LAST} --num-workers 0 --device cpu --data-path ../base/images".split()
USES = {
    "continue": ("train_kd", [*TWO_EPOCHS, "--output-dir", "run"]),
    "resume": ("train_kd", [*TWO_EPOCHS, "--output-dir", "new", "--resume", LAST]),
    "eval": ("eval", EVAL),
    "average": ("eval", [*EVAL, "--weights-key", "model_ema"]),
    "export": ("analysis.export", f"--checkpoint {LAST} --out out.pth".split()),
    "complexity": ("analysis.complexity", f"--checkpoint {LAST}".split()),
}


def checkpoints(rng: random.Random, folder: Path, base: Path) -> Result:
    shutil.copytree(base / "half", folder / "run")
    use, is_damaged = rng.choice(["continue", "continue", "eval", *USES]), rng.random() < 0.6
    if is_damaged:
        content, label = damage((folder / LAST).read_bytes(), rng)
        (folder / LAST).write_bytes(content)
    else:
        label = rewrite(folder / LAST, rng)
    result = judge(run(*USES[use], folder), f"{use}, {label}")
    if result.right and is_damaged and (fault := other_content(use, folder, base)):
        return Result(fault=f"{fault}, and nobody is told", label=result.label)
    return result


def other_content(use: str, folder: Path, base: Path) -> str:
    """How what came out differs from what the whole file gives; empty when it does not."""
    whole = use_whole(use, base)
    if use in ("continue", "resume"):
        name = "run" if use == "continue" else "new"
        return "; ".join(compare(folder / name, whole / name)[:3])
    if use == "export":
        contents = [(place / "out.pth").read_bytes() for place in (folder, whole)]
    else:
        contents = [figures((place / "output.log").read_text()) for place in (folder, whole)]
    return "" if contents[0] == contents[1] else f"{contents[0][:300]}, not {contents[1][:300]}"


def figures(output: str) -> list[str]:
    return [line for line in output.splitlines()
            if line.startswith(("images  ", "top-", "cross-entropy", "| resnet"))]


@cache
def use_whole(use: str, base: Path) -> Path:
    """The folder in which the undamaged file was used."""
    folder = base.parent / f"whole-{use}"
    shutil.copytree(base / "half", folder / "run")
    ended = run(*USES[use], folder)
    assert ended.code == 0, ended
    return folder


def odd_values() -> dict[str, Any]:
    """What may stand where another value is expected."""
    one = torch.ones(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that such tensors are rare
        return {
            "none": None, "text": "x", "true": True, "minus one": -1, "zero": 0, "huge": 10 ** 30,
            "infinite": float("inf"), "nan": float("nan"), "list": [1, 2], "empty list": [],
            "tuple": (), "dict": {"a": 1}, "empty dict": {}, "bytes": b"x", "set": {1},
            "complex": 1j, "tensor": one, "scalar tensor": torch.tensor(1.0),
            "empty tensor": torch.empty(0),
            "integers": one.long(), "booleans": one.bool(), "half": one.half(),
            "complex tensor": torch.ones(2, 3, dtype=torch.complex64), "double": one.double(),
            "float8": one.to(torch.float8_e4m3fn), "nan tensor": one * float("nan"),
            "sparse": one.to_sparse(), "csr": one.to_sparse_csr(), "meta": one.to("meta"),
            "quantized": torch.quantize_per_tensor(one, 0.1, 0, torch.qint8),
            "nested": torch.nested.nested_tensor([one, one]), "size": torch.Size([1]),
            "expanded": torch.ones(1).expand(10 ** 12), "nine dimensions": torch.ones((1,) * 9),
            "parameter": nn.Parameter(one), "dtype": torch.float32, "device": torch.device("cpu")}


def alike(value: Any, rng: random.Random) -> Any:
    """A value of the same kind that is not the same: a tensor of another type, and so on."""
    if isinstance(value, torch.Tensor):
        return rng.choice([
            value.double(), value.half(), value.long(), value * float("nan"), value.bool(),
            value.to_sparse(), value.to("meta"), value.flatten(), value[None], value.unsqueeze(-1),
            value.to(torch.complex64), nn.Parameter(value.float()), value.new_empty(0)])
    if isinstance(value, (int, float)):
        return rng.choice([-value, value + 1, value * 10 ** 6, float(value), str(value), 2 ** 70])
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1], "x" * 10 ** 5, "\ud800", 0, [value]])
    if isinstance(value, (list, tuple)):
        return rng.choice([[*value, *value], list(value)[:-1], list(value)[::-1], tuple(value)])
    return rng.choice([None, {}])


def change_somewhere(content: dict, rng: random.Random) -> str:
    """One entry, at any depth, gone, renamed, added or replaced; its path."""
    place, path = content, []
    while True:
        key = rng.choice(list(place))
        path.append(str(key))
        if not (isinstance(place[key], dict) and place[key]) or rng.random() < 0.25:
            break
        place = place[key]
    kind = rng.choice(["gone", "renamed", "added", "odd", "odd", "alike", "swapped"])
    if kind == "gone" and len(place) > 1:
        del place[key]
    elif kind == "renamed":
        place[rng.choice([f"{key}x", 7, None, (1, 2), b"x", ""])] = place.pop(key)
    elif kind == "added":
        place[rng.choice(["extra", 3, None])] = rng.choice(list(odd_values().values()))
    elif kind == "alike":
        place[key] = alike(place[key], rng)
    elif kind == "swapped":
        other = rng.choice(list(place))
        place[key], place[other] = place[other], place[key]
    else:
        kind = rng.choice(list(odd_values()))
        place[key] = odd_values()[kind]
    return f"{' '.join(path)}: {kind}"


def rewrite(path: Path, rng: random.Random) -> str:
    """Change one to three entries and save as this program does, or as another would."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    content.pop(CHECKSUMS)
    label = ", ".join(change_somewhere(content, rng) for _ in range(rng.choice([1, 1, 1, 2, 3])))
    if rng.random() < 0.5:
        try:
            save_atomically(content, path)
            return f"{label}, with checksums"
        except Exception:  # there is no sum of such a thing, so nobody can write it
            label += " (no checksums)"
    try:
        torch.save(content, path)
    except Exception:  # torch does not write such a thing
        path.write_bytes(b"")
    return label
