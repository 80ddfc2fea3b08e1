"""What README says can be done, is."""
import re
import shlex
from pathlib import Path

import torch

import eval as evaluation
import models
import train_kd
from analysis import curves, erf, similarity
from analysis.complexity import table
from losses import create_loss
from losses.base import LOSSES
from models.base import MODELS
from models.weights import published_table

README = (Path(__file__).parent.parent / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_model_and_loss_work(monkeypatch):
    monkeypatch.setattr(MODELS, "_entries", dict(MODELS._entries))
    monkeypatch.setattr(LOSSES, "_entries", dict(LOSSES._entries))
    examples = [block for block in code_blocks("python") if "register_" in block]
    assert len(examples) == 2
    for example in examples:
        exec(example, {"__name__": "example"})
    student = models.create_model("tiny_64", 10)
    teacher = models.create_model("tiny_32", 10, width=48)
    images = torch.randn(2, 3, 32, 32)
    output = student.forward_with_features(images)
    assert output.features[0].shape == (2, 64, 8, 8) and teacher.feature_info[0].channels == 48
    loss = create_loss("logit_mse", student.feature_info, teacher.feature_info)
    value = loss(output, teacher.forward_with_features(images), torch.tensor([0, 1]))
    value.backward()
    assert student.head.weight.grad.abs().sum() > 0


PROGRAMS = {"train_kd.py": train_kd, "eval.py": evaluation, "analysis.erf": erf,
            "analysis.similarity": similarity, "analysis.curves": curves}


def test_the_commands_parse():
    """Every command line of these programs, with its flags and names."""
    seen = []
    for block in code_blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for program, module in PROGRAMS.items():
                if program in words:
                    words = words[:words.index("||")] if "||" in words else words
                    args = module.build_parser().parse(words[words.index(program) + 1:])
                    for name in ("teacher", "student", "model"):
                        spec = getattr(args, name, None)
                        assert not spec or spec[0] in [*models.list_models(), "none"]
                    seen.append(program)
    assert len(seen) >= 10 and {*seen} == PROGRAMS.keys()


def test_the_table_of_models_is_what_the_command_prints():
    rows = table([[name] for name in models.list_models()], 1000).splitlines()
    missing = [row for row in rows if row not in README.splitlines()]
    assert not missing, "run python -m analysis.complexity and paste its table into README"


def test_the_table_of_addresses_is_the_programs():
    missing = [row for row in published_table().splitlines() if row not in README.splitlines()]
    assert not missing
