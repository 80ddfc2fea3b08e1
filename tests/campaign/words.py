"""Fuzzed command lines of every program, recipes, and the texts of a run folder. Paths stay within
the folder of the attack."""
import argparse
import json
import random
import shutil
import sys
from pathlib import Path

import yaml

from tests.campaign.base import TINY, TWO_EPOCHS, damage
from tests.campaign.process import ROOT, Result, judge, run

CHECKPOINT = "--checkpoint run/checkpoint-last.pth "
ON_IMAGES = "--data-path ../base/images --num-workers 0 "
WORKING = [  # command lines that work, the more often a program is here the more it is tried
    *[("train_kd", [*TINY, "--dry-run", "--output-dir", "fresh"])] * 4,
    *[("train_kd", [*TINY, "--dry-run", "--output-dir", "fresh", "--teacher", "slak_nano",
                    "--teacher-weights", "random", "--loss", "nkd", "--loss", "fd"])] * 4,
    *[("train_kd", [*TINY, "--output-dir", "fresh"])] * 2,
    *[("train_kd", [*TINY, "--output-dir", "fresh", "--sparsity", "0.5", "--sparse-init", "erk",
                    "--model-ema"])] * 2,
    *[("eval", (CHECKPOINT + ON_IMAGES).split())] * 2,
    ("eval", ("--model resnet_nano --weights run/checkpoint-last.pth --num-classes 3 --input-size "
              "32 " + ON_IMAGES).split()),
    ("predict", ("../base/images/val/a --num-workers 0 " + CHECKPOINT).split()),
    ("analysis.curves", ["run"]),
    ("analysis.report", ["run"]),
    ("analysis.erf", (CHECKPOINT + ON_IMAGES + "--images 2 --size 64 --no-control").split()),
    ("analysis.similarity", (CHECKPOINT + "run/checkpoint-best.pth --images 12 --batch-size 4 "
                             + ON_IMAGES).split()),
    ("analysis.complexity", "--model resnet_nano --input-size 32".split()),
    ("analysis.complexity", CHECKPOINT.split()),
    ("analysis.export", (CHECKPOINT + "--out out.pth").split()),
]
NUMBERS = ("0 -0 1 -1 2 3 7 32 0.5 -0.5 1.0 1e-3 1e308 -1e308 1e-320 1e400 nan inf -inf 100000 "
           "2147483648 4294967297 9223372036854775807 9223372036854775808 "
           "100000000000000000000000000000 0x10 1_000 1,2 1e1000000 ١٢ ½ True None").split()
PLAIN = ["0", "1", "2", "3", "4", "8", "24", "32", "0.1", "0.5", "0.9", "1e-3"]
WORDS = ["", " ", "=", "==", "a=b", "-", "--", "ü", "日本", "a b", "a\nb", "x" * 300, "x" * 5000,
         "none", "true", "false", "auto", "random", "published", "'", "\\", "%s", "{}", "$HOME",
         "\udcff", "http://localhost/x.pth", "https://example.invalid/y.pth", "http://", "a/b/c"]
PATHS = [".", "..", "fresh", "run", "file.txt", "missing", "missing/deeper", "empty", "../base/run",
         "run/log.txt", "run/args.yaml", "run/checkpoint-last.pth", "out.npz", "out.pth", "out",
         "out.safetensors", "run/checkpoint-best-ema.pth", "null", "full", "file.txt/x",
         "/proc/self/mem", "/proc/none/x", "../base/images", "../base/images/train", "~", "~none/x",
         "../base/images/val/a/0.png", "\udcff/x", "y" * 260, "loop"]
NANO = ["resnet_nano", "slak_nano", "convnext_bn_nano", "vit_nano", "swin_nano", "cswin_nano",
        "mobilenetv3_nano", "efficientnet_nano"]
# What makes a run long that trains or measures, which is no fault.
LONG = {"--epochs", "--batch-size", "--input-size", "--data-set", "--student", "--teacher",
        "--compile", "--num-workers", "--large-kernel", "--size", "--images", "--model"}
VALUES = [None, True, False, 0, -1, 3, 2 ** 63, 10 ** 30, 0.5, float("nan"), float("inf"), "", " ",
          "--lr", "--lr 3", [], [1], [1, 2], [None], [[]], [["ce"], ["kd", "weight=1"]], {},
          ["ce", "kd"], {"a": 1}, [{"a": 1}], b"bytes", "a\nb", "=", "ce weight=2", "2020-01-01"]
YAML = ["lr: 2020-01-01", "lr: 2020-01-01 10:00:00", "lr: !!binary aGk=", "lr: !!set {a, b}", "{",
        "lr: &a [*a]", "&a {lr: *a}", "lr: 1\nlr: 2", "lr: !!python/object/apply:os.getcwd []",
        "lr: !!python/name:os.system", "lr: !x 1", "- lr", "lr", "42", "null", "~: 1", "lr: 1:30",
        "? [a, b]\n: 1", "lr: 1\n---\nlr: 2", "\tlr: 1", "lr:\t1", "lr: 'x", "lr: 0b11", "lr: 0o17",
        "lr: .inf", "lr: .NaN", "1: 2", "true: 3", "[1]: 2", "{a: b}: c", "lr: |\n  1\n", "<<: 1",
        "%YAML 9.9\n--- {}", "lr: !!float 'x'", "lr: !!int 'x'", "lr: !!timestamp x", "<<: *a",
        "lr: \x00", "\ufefflr: 1", "lr: \u2028 1", "config: a.yaml", "lr: " + "9" * 5000,
        "a: &a [x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]"
        "\nd: &d [*c, *c, *c, *c, *c, *c]\nlr: [*d, *d, *d, *d, *d, *d, *d, *d, *d]",
        "x: " + "[" * 3000, "x: " + "{a: " * 500]
LINES = ["", "{}", "[]", "null", "3", '"x"', "{", "NaN", '{"epoch": "x"}', '{"epoch": null}',
         "\0", '{"epoch": 0}',
         '{"epoch": 1e99}', '{"epoch": NaN, "test_acc1": NaN}', "\u2028", "[" * 3000]


def flags(rng: random.Random, folder: Path, base: Path) -> Result:
    """A command line that works, with one to five changes."""
    shutil.copytree(base / "run", folder / "run")
    (folder / "empty").mkdir()
    (folder / "file.txt").write_text("no image, no recipe\n")
    for name, target in (("loop", "loop"), ("null", "/dev/null"), ("full", "/dev/full")):
        (folder / name).symlink_to(target)  # a device itself might be replaced by a file
    program, argv = rng.choice(WORKING)
    argv = mutate(program, list(argv), rng)
    return judge(run(program, argv, folder), f"{program} {argv!r}"[:700])


def mutate(program: str, argv: list[str], rng: random.Random) -> list[str]:
    actions = [action for action in actions_of(program) if action.dest != "dry_run"]
    if "--dry-run" not in argv:
        actions = [action for action in actions if not LONG & set(action.option_strings)]
    is_tame = rng.random() < 0.6  # all that the parser can see is right
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 5])):
        kind = rng.random()
        if kind < 0.8 or is_tame:
            argv += words_of(rng.choice(actions), rng, is_tame)
        elif kind < 0.9 and argv:  # something is missing
            del argv[rng.randrange(len(argv))]
        elif kind < 0.95:
            argv.insert(rng.randint(0, len(argv)), rng.choice(WORDS + NUMBERS))
        else:
            flag = rng.choice([a for a in actions if a.option_strings]).option_strings[0]
            i = rng.randrange(2, len(flag))
            argv.append(flag[:i] + rng.choice(["", "x", "-", "_"]) + flag[i + 1:])
    return argv if program != "train_kd" or "--dry-run" in argv else [*argv, "--epochs", "1"]


def actions_of(program: str) -> list[argparse.Action]:
    parser = sys.modules[program].build_parser()
    return [action for action in parser._actions if action.dest != "help"]


def words_of(action: argparse.Action, rng: random.Random, is_tame: bool) -> list[str]:
    """One flag with its values."""
    flag = rng.choice(action.option_strings) if action.option_strings else None
    if flag and rng.random() < 0.1:
        flag = "--" + flag[2:].replace("-", "_")
    if isinstance(action, argparse.BooleanOptionalAction):
        return [flag, *rng.choice([[], [], ["true"], ["false"]] * 3 + [["maybe"] * (not is_tame)])]
    count = action.nargs if isinstance(action.nargs, int) else 1
    if action.nargs in ("+", "*"):
        count = rng.randint(1, 4)
    if not is_tame:
        count = max(0, count + rng.choice([0] * 15 + [-1, 1]))
    values = [value_of(action, rng, is_tame) for _ in range(count)]
    if flag in ("--student", "--teacher", "--model", "--loss", "--data-set") and values:
        values = spec_of(flag, rng)
    if flag is None:
        return values
    return [f"{flag}={values[0]}"] if len(values) == 1 and rng.random() < 0.3 else [flag, *values]


def value_of(action: argparse.Action, rng: random.Random, is_tame: bool) -> str:
    if not is_tame and rng.random() < 0.5:
        return rng.choice(rng.choice([NUMBERS, WORDS, PATHS]))
    if action.choices:
        return str(rng.choice(list(action.choices)))
    if action.type is Path:
        return rng.choice(PATHS)
    wanted = rng.choice([PLAIN, PLAIN, NUMBERS]) if action.type else [*WORDS, *PATHS]
    own = [str(action.default)] if isinstance(action.default, (int, float, str)) else []
    value = rng.choice([*wanted, *own * 3])
    while is_tame and action.type and not fits(action, value):
        value = rng.choice(PLAIN + NUMBERS)
    return value


def fits(action: argparse.Action, value: str) -> bool:
    try:
        action.type(value)
    except (ValueError, argparse.ArgumentTypeError):
        return False
    return True


def spec_of(flag: str, rng: random.Random) -> list[str]:
    """NAME key=value ..., with the keys that the name has and others."""
    from data.datasets import DATASETS
    from losses.base import LOSSES
    from models.base import MODELS
    registry = {"--loss": LOSSES, "--data-set": DATASETS}.get(flag, MODELS)
    name = rng.choice(NANO if registry is MODELS and rng.random() < 0.8 else registry.names())
    keys = [*registry.defaults(name), "weight", "num_classes", "name", "x", "split", "model"]
    options = []
    for key in rng.choices(keys, k=rng.choice([0, 1, 1, 2, 3])):
        own = str(registry.defaults(name).get(key, 1)).strip("()").replace(" ", "")
        value = rng.choice([own, rng.choice(PLAIN), rng.choice(
            [*NUMBERS, "true", "false", "none", "1,2,3", "5,5,5,5,5", "a", ",", "0,0"])])
        options.append(key + rng.choice(["="] * 19 + ["=="]) + value)
    return [rng.choice([name] * 20 + [name[:-1], name.upper(), ""]), *options]


def recipes(rng: random.Random, folder: Path, base: Path) -> Result:
    """`--config` with values of other types, YAML that is none, or damaged bytes."""
    kind = rng.choice(["values", "values", "values", "text", "damaged"])
    if kind == "values":
        content = {}
        for _ in range(rng.randint(1, 3)):
            key = rng.choice(actions_of("train_kd")).dest
            key = rng.choice([key, key.replace("_", "-")])
            content[key] = rng.choice(VALUES + NUMBERS + WORDS)
        recipe = yaml.dump(content).encode(errors="surrogateescape")
    elif kind == "text":
        recipe = rng.choice(YAML).encode(rng.choice(["utf-8"] * 6 + ["utf-16", "utf-8-sig"]))
    else:
        whole = [base / "run" / "args.yaml", *sorted((ROOT / "run_scripts/recipes").glob("*.yaml"))]
        recipe, _ = damage(rng.choice(whole).read_bytes(), rng)
    (folder / "recipe.yaml").write_bytes(recipe)
    ended = run("train_kd", [*TINY, "--dry-run", "--config", "recipe.yaml"], folder)
    return judge(ended, f"{kind} {recipe[:200]!r}")


def logs(rng: random.Random, folder: Path, base: Path) -> Result:
    """log.txt or args.yaml, as the analysis reads them and as a run finds them that goes on."""
    program = rng.choice(["analysis.curves", "analysis.report", "train_kd"])
    shutil.copytree(base / ("half" if program == "train_kd" else "run"), folder / "run")
    path = folder / "run" / rng.choice(["log.txt", "log.txt", "args.yaml"])
    kind, lines = rng.choice(["values", "lines", "damaged"]), path.read_text().splitlines()
    if kind == "damaged":
        path.write_bytes(damage(path.read_bytes(), rng)[0])
    elif path.suffix == ".yaml":
        path.write_text(rng.choice(YAML))
    else:
        record = json.loads(lines[-1])
        for key in rng.sample(list(record), rng.randint(1, 3)):
            record[key] = rng.choice([*VALUES[:-5], {}, 10 ** 400])
            if rng.random() < 0.3:
                del record[key]
        line = json.dumps(record, default=str) if kind == "values" else rng.choice(LINES)
        lines[rng.randrange(len(lines)):len(lines)] = [line, *lines[-rng.randint(0, 1):]]
        path.write_text("\n".join(lines) + "\n")
    argv = [*TWO_EPOCHS, "--output-dir", "run"] if program == "train_kd" else ["run"]
    return judge(run(program, argv, folder), f"{program}, {path.name} {kind}")
