"""What design.md says about who imports whom, where `args` ends, and how long things get."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "losses", "data", "utils", "analysis")
MAINS = ("train_kd", "eval", "predict")
OURS = {*PACKAGES, *MAINS, "engine", "hubconf", "tests"}

# Which of our modules each place may import; a prefix stands for all below it.
PROGRAM_MAY = {"models", "losses", "data", "engine", "utils"}
MAY_IMPORT = {
    "utils": {"utils"},
    "models": {"models", "utils"},
    "losses": {"losses", "utils", "models.base"},
    "data": {"data", "utils"},
    "engine": {"utils"},
    "analysis": {"analysis", "models", "data", "utils"},
    "analysis/benchmark": {"analysis", *PROGRAM_MAY},  # it runs the real step
    "train_kd": PROGRAM_MAY,
    "eval": PROGRAM_MAY,
    "predict": PROGRAM_MAY,
    "hubconf": {"models", "predict"},
}
# Third-party packages; safetensors is optional, looked for when a file of its kind is read, and
# Triton, which comes with PyTorch on most machines.
THIRD_PARTY = {"utils": {"torch", "numpy", "yaml", "tqdm", "safetensors"},
               "models": {"torch", "torchvision", "triton", "timm"}, "losses": {"torch"},
               "data": {"torch", "numpy", "torchvision", "PIL"},
               "engine": {"torch"}, "train_kd": {"torch"}, "eval": {"torch", "numpy"},
               "predict": {"torch", "torchvision", "PIL"}, "hubconf": set()}
LONGEST_FILE, LONGEST_PROGRAM, LONGEST_LOSS = 450, 475, 90  # lines; the program is train_kd.py
LONGEST_FUNCTION, LONGEST_MAIN = 60, 120


def source_files() -> list[Path]:
    """Every Python file of the program, relative to the repository."""
    files = [ROOT / "engine.py", ROOT / "hubconf.py", *(ROOT / f"{name}.py" for name in MAINS)]
    files += [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [path.relative_to(ROOT) for path in files]


PROGRAM = source_files()
TESTS = [path.relative_to(ROOT) for path in sorted((ROOT / "tests").rglob("*.py"))]
IDS = dict(ids=str)


def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


def place_of(path: Path) -> str:
    """The key of MAY_IMPORT that a file falls under."""
    if path.parts[:2] == ("analysis", "benchmark"):
        return "analysis/benchmark"
    return path.parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> set[str]:
    """Dotted names of imported modules; `from models import base` counts as models.base when that
    is a module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                place = ROOT / deeper.replace(".", "/")
                is_module = place.with_suffix(".py").exists() or place.is_dir()
                names.add(deeper if is_module else node.module)
    return names


def is_below(name: str, allowed: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


def forbidden_imports(path: Path, tree: ast.Module) -> list[str]:
    allowed = MAY_IMPORT[place_of(path)]
    return sorted(name for name in imported(tree)
                  if name.split(".")[0] in OURS and not is_below(name, allowed))


def foreign_imports(path: Path, tree: ast.Module) -> list[str]:
    allowed = THIRD_PARTY.get(place_of(path))
    roots = {name.split(".")[0] for name in imported(tree)} - OURS - sys.stdlib_module_names
    return sorted(roots - allowed) if allowed is not None else []


@pytest.mark.parametrize("path", PROGRAM, **IDS)
def test_import_directions(path):
    assert not forbidden_imports(path, tree_of(path))


@pytest.mark.parametrize("path", PROGRAM, **IDS)
def test_third_party_packages(path):
    """TensorBoard's writer is torch's; everything else optional stays out of the program."""
    assert not foreign_imports(path, tree_of(path))


def test_networks_of_timm_have_one_home():
    """There it is imported inside the functions that need it: all else works without."""
    users = {path.as_posix() for path in PROGRAM if path.parts[0] == "models"
             and is_below_any(imported(tree_of(path)), "timm")}
    assert users == {"models/library.py"}
    library = tree_of(Path("models/library.py"))
    assert not is_below_any(imported(ast.Module([node for node in library.body if isinstance(
        node, (ast.Import, ast.ImportFrom))], [])), "timm")


def test_homes_of_torchvision_models():
    """data/layouts.py takes the words for ImageNet's classes from there."""
    users = {path.as_posix() for path in PROGRAM
             if is_below_any(imported(tree_of(path)), "torchvision.models")}
    assert users <= {"models/transformers.py", "models/efficient.py", "data/layouts.py"}


def is_below_any(names: set[str], prefix: str) -> bool:
    return any(is_below(name, {prefix}) for name in names)


@pytest.mark.parametrize("path", [*PROGRAM, *TESTS], **IDS)
def test_nothing_but_tests_imports_the_mains(path):
    names = {name.split(".")[0] for name in imported(tree_of(path))}
    assert not names & {"train_kd", "eval"} or path in TESTS
    assert "predict" not in names or path in (*TESTS, Path("hubconf.py"))
    assert "tests" not in names or path in TESTS


# args


def has_namespace(annotation: ast.expr | None) -> bool:
    return annotation is not None and "Namespace" in ast.unparse(annotation)


def args_named(tree: ast.Module) -> list[int]:
    """Lines where a parameter or variable is called args, but for *args."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            lines += [arg.lineno for arg in (*node.posonlyargs, *node.args, *node.kwonlyargs)
                      if arg.arg == "args"]
        elif isinstance(node, ast.Name) and node.id == "args" and isinstance(node.ctx, ast.Store):
            lines.append(node.lineno)
    return lines


def namespaces(tree: ast.AST) -> list[int]:
    """Lines where a parameter, variable or result is annotated as a Namespace."""
    lines = []
    for node in ast.walk(tree):
        annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
        if isinstance(annotation, ast.expr) and has_namespace(annotation):
            lines.append(node.lineno)
    return lines


MAY_HOLD_ARGS = {"train_kd.py", "eval.py", "predict.py", "utils/config.py"}


@pytest.mark.parametrize("path", [path for path in PROGRAM
                                  if path.as_posix() not in MAY_HOLD_ARGS], **IDS)
def test_args_end_in_the_mains(path):
    """In analysis/ a main holds them; `args` is otherwise what a run folder says, a dict."""
    tree = tree_of(path)
    if path.parts[0] != "analysis":
        assert not args_named(tree) and not namespaces(tree)
        return
    mains = {id(node) for main in tree.body if getattr(main, "name", None) == "main"
             for node in ast.walk(main)}
    outside = [node for node in ast.walk(tree) if id(node) not in mains]
    assert not [node.lineno for node in outside
                if has_namespace(getattr(node, "annotation", None))]
    assert not [node.lineno for node in outside
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                and node.value.id == "args" and node.attr not in ("items", "keys", "get")]


# Size and habits


@pytest.mark.parametrize("path", [*PROGRAM, *TESTS], **IDS)
def test_functions_fit_a_page(path):
    long = [f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
            for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)
            and node.end_lineno - node.lineno + 1 > (
                LONGEST_MAIN if node.name == "main" else LONGEST_FUNCTION)]
    assert not long


@pytest.mark.parametrize("path", PROGRAM, **IDS)
def test_files_fit_one_idea(path):
    longest = LONGEST_LOSS if path.parts[0] == "losses" else LONGEST_FILE
    longest = LONGEST_PROGRAM if path == Path("train_kd.py") else longest
    assert len((ROOT / path).read_text().splitlines()) <= longest


def bad_habits(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"line {node.lineno}: bare except")
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            found.append(f"line {node.lineno}: import *")
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant):
            found.append(f"line {node.lineno}: assert of a constant")
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            if any(isinstance(value, (ast.List, ast.Dict, ast.Set)) for value in defaults):
                found.append(f"line {node.lineno}: mutable default")
    return found


@pytest.mark.parametrize("path", [*PROGRAM, *TESTS], **IDS)
def test_bad_habits(path):
    assert not bad_habits(tree_of(path))


MACHINE_PATH = re.compile(
    r"(?<![\w.$}~-])/(?:home|root|work|Users|mnt|data|scratch|tmp|projects|opt)/\w")


def tracked_text_files() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True,
                                check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):  # a copy without git
        pytest.skip("not a git checkout")
    suffixes = {".py", ".sh", ".yaml", ".yml", ".md", ".txt", ".toml", ".ini", ".json", ""}
    return [Path(name) for name in listed if name and Path(name).suffix in suffixes
            and (ROOT / name).is_file()]


def test_no_path_of_one_machine():
    found = [f"{path}:{number}: {line.strip()}" for path in tracked_text_files()
             for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
             if MACHINE_PATH.search(line)]
    assert not found


@pytest.mark.parametrize("package, helpers", [
    ("models", {"base", "distiller", "kept_logits", "layers", "published", "sparsity",
                "state_dicts", "teacher_cache", "teacher_manifest", "weights"}),
    ("losses", {"base"})])
def test_everything_is_registered_by_an_import(package, helpers):
    """Helpers register nothing; any other file is a model or loss and must be imported."""
    names = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"} - helpers
    known = imported(tree_of(Path(package) / "__init__.py"))
    assert names and {f"{package}.{name}" for name in names} <= known
    for helper in helpers:
        assert f"@register_{package[:-1].removesuffix('e')}" not in (
            ROOT / package / f"{helper}.py").read_text()


# That the checks above can fail


def test_a_wrong_file_is_noticed():
    wrong = ast.parse("import models\nfrom losses import fd\nimport timm\nfrom engine import *\n"
                      "def f(args, x=[]):\n    try:\n        pass\n    except:\n        pass\n"
                      "def g(a: argparse.Namespace): ...\nassert False\n")
    path = Path("data/wrong.py")
    assert forbidden_imports(path, wrong) == ["engine", "losses.fd", "models"]
    assert foreign_imports(path, wrong) == ["timm"]
    assert forbidden_imports(Path("losses/x.py"), ast.parse("from models import convnext")) == [
        "models.convnext"]
    assert not forbidden_imports(Path("losses/x.py"), ast.parse("from models import base"))
    assert args_named(wrong) == [5] and namespaces(wrong) == [10]
    assert len(bad_habits(wrong)) == 4
    for line in ("x = '/ho" + "me/me/a'", "cd /wo" + "rk/main"):
        assert MACHINE_PATH.search(line)
    for line in ("data/loader.py", "https://example.org/data/x", "$HOME/tmp/x", "#!/usr/bin/env"):
        assert not MACHINE_PATH.search(line)
