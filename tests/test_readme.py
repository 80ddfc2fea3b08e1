"""What README and docs say can be done, is; what they say a command prints, it prints."""
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval as evaluation
import losses
import models
import predict
import train_kd
from analysis import complexity, curves, erf, export, report, similarity
from analysis.benchmark.__main__ import COMMANDS
from data.datasets import list_datasets
from losses.base import LOSSES
from models.base import MODELS
from models.published import published_table
from tests.helpers import make_state
from utils.config import Parser
from utils.registry import parse_spec

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
NAMES = dict(ids=lambda path: path.name)
SCRIPTS = {path.relative_to(ROOT / "run_scripts").as_posix()
           for path in (ROOT / "run_scripts").glob("**/*.sh")}


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    """Lines of bash blocks and what stands between single backticks; continued lines in one."""
    text = page.read_text()
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    blocks = [block.replace("\\\n", " ") for block in code_blocks(page, "bash")]
    inline = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", outside)]
    return [line for block in blocks for line in block.splitlines()] + inline


def test_the_example_model_and_loss_work(monkeypatch):
    monkeypatch.setattr(MODELS, "_entries", dict(MODELS._entries))
    monkeypatch.setattr(LOSSES, "_entries", dict(LOSSES._entries))
    examples = [block for block in code_blocks(ROOT / "README.md", "python")
                if "register_" in block]
    assert len(examples) == 2
    for example in examples:
        exec(example, {"__name__": "example"})
    student = models.create_model("tiny_64", 10)
    teacher = models.create_model("tiny_32", 10, width=48)
    images = torch.randn(2, 3, 32, 32)
    output = student.forward_with_features(images)
    assert output.features[0].shape == (2, 64, 8, 8) and teacher.feature_info[0].channels == 48
    loss = losses.create_loss("logit_mse", student.feature_info, teacher.feature_info)
    value = loss(output, teacher.forward_with_features(images), torch.tensor([0, 1]))
    value.backward()
    assert student.head.weight.grad.abs().sum() > 0


def test_the_example_of_use_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = make_state(models.create_model("convnext_bn_nano", 10), {"ce": {}}, None)
    Path("runs/NAME").mkdir(parents=True)
    settings = {"student": ["convnext_bn_nano"], "num_classes": 10, "input_size": 64}
    torch.save({**state.state_dict(), "args": settings}, "runs/NAME/checkpoint-best.pth")
    (example,) = [block for block in code_blocks(ROOT / "README.md", "python")
                  if "distilled" in block]
    Image.new("RGB", (80, 70), "teal").save("cat.jpg")
    found = {}
    exec(example, found)
    assert found["logits"].shape == (1, 10)


PARSERS = {"train_kd.py": train_kd.build_parser, "eval.py": evaluation.build_parser,
           "predict.py": predict.build_parser,
           **{f"analysis.{module.__name__.rpartition('.')[2]}": module.build_parser
              for module in (complexity, curves, erf, export, report, similarity)},
           **{f"analysis.benchmark {name}": module.build_parser
              for name, module in COMMANDS.items()}}


def split_command(line: str) -> tuple[str, list[str]] | None:
    """The program and the words after it, of a command that starts one; else None."""
    words = shlex.split(line.replace("...", ""), comments=True)
    if "||" in words:
        words = words[:words.index("||")]
    for number, word in enumerate(words):
        is_started = number and words[0] != "bash" and (word.endswith(".py") or words[number - 1]
                                                        == "-m")
        name = " ".join(words[number:number + 1 + (word == "analysis.benchmark")])
        if is_started and name in PARSERS:
            return name, words[number + len(name.split()):]
    return None


def check_command(parser: Parser, words: list[str]) -> None:
    """Its flags, and its names of networks, losses and data sets, are known."""
    args = parser.parse(words)
    networks = [*models.list_models(), *models.LIBRARIES, "my_module:build"]
    known = {"teacher": [*networks, "none"], "student": networks, "model": networks,
             "loss": losses.list_losses(), "data_set": list_datasets()}
    for flag, names in known.items():
        specs = getattr(args, flag, None) or []
        for spec in specs if specs and isinstance(specs[0], list) else [specs] * bool(specs):
            assert parse_spec(spec, flag)[0] in names


def test_the_commands_parse():
    seen = set()
    for page in PAGES:
        for line in commands(page):
            found = split_command(line) if re.search(r"\.py |-m analysis", line) else None
            if found and found[1]:  # without flags it is a mention
                check_command(PARSERS[found[0]](), found[1])
                seen.add(found[0])
    assert seen == PARSERS.keys()


def expanded(name: str) -> list[str]:
    """Shell braces: a{b,c}d is abd and acd."""
    match = re.search(r"\{(.*?)\}", name)
    if not match:
        return [name]
    return [text for option in match[1].split(",")
            for text in expanded(name[:match.start()] + option + name[match.end():])]


def scripts_of(page: Path) -> set[str]:
    found = re.findall(r"(?:run_scripts/)?((?:\w+/)?[\w{},-]+\.sh)\b", page.read_text())
    return {name for pattern in found for name in expanded(pattern)}


def test_scripts_that_are_named_exist_and_every_experiment_is_listed():
    named = {name for page in PAGES for name in scripts_of(page)}
    assert named <= SCRIPTS
    listed = scripts_of(ROOT / "docs" / "experiments.md") | scripts_of(ROOT / "docs" / "results.md")
    experiments = {name for name in SCRIPTS if "/" in name}
    assert not experiments - listed - {"studies/imagenette128.sh"}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], **NAMES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", page.read_text())
    for link in (first or second for first, second in links):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", DOCS, **NAMES)
def test_pages_open_with_their_purpose_and_a_command(page):
    title, purpose, *_ = re.split(r"\n\n", page.read_text())
    assert title.startswith("# ") and len(purpose.split()) > 5
    start = page.read_text().index("```bash")
    assert page.read_text()[:start].count("\n") < 12, "a command near the top"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_the_table_of_models_is_what_the_command_prints():
    rows = complexity.table([[name] for name in models.list_models()], 1000).splitlines()
    page = (ROOT / "docs" / "models.md").read_text().splitlines()
    missing = [row for row in rows if row not in page]
    assert not missing, "run python -m analysis.complexity and paste its table into docs/models.md"


def test_the_table_of_addresses_is_the_programs():
    page = (ROOT / "docs" / "models.md").read_text().splitlines()
    assert not [row for row in published_table().splitlines() if row not in page]


def test_every_loss_has_its_row_with_its_defaults():
    page = (ROOT / "docs" / "losses.md").read_text()
    for name in losses.list_losses():
        assert f"| `{name}` |" in page, name
