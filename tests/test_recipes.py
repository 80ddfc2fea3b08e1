"""Recipes; what of the student is kept as it is; what shrinks to a small data set."""
import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import losses
import train_kd
from models import VisionModel, create_model, list_models
from models.base import run_on_shapes
from models.distiller import Distiller
from utils.optim import build_optimizer, parameter_groups
from utils.registry import UserError, parse_spec

NANO = [name for name in list_models() if name.endswith(("_nano", "_pico"))]


class Score(nn.Module):
    """A loss whose gradient reaches everything that may have one."""

    def forward(self, student, teacher, targets) -> torch.Tensor:
        return student.logits.logsumexp(1).mean() + student.features[-1].square().mean()


def train_once(student: nn.Module, what: str | None) -> Distiller:
    distiller = Distiller(student, {"score": Score()}, {"score": 1.0}, freeze=what)
    distiller.train()
    optimizer = build_optimizer("adamw", parameter_groups(distiller, 0.05), lr=1e-2)
    size = student.input_size if student.fixed_size else 64
    torch.manual_seed(0)
    distiller(torch.randn(2, 3, size, size), None, None)[0].backward()
    optimizer.step()
    return distiller


def changed(model: VisionModel, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not value.equal(before[name])}


@pytest.mark.parametrize("name", NANO)
def test_backbone_leaves_the_classifier_alone_to_train(name):
    student = create_model(name, 10)
    before = copy.deepcopy(student.state_dict())
    distiller = train_once(student, "backbone")
    heads = {f"{head}.{end}" for head in student.classifiers for end in ("weight", "bias")}
    assert changed(student, before) == heads  # no statistics of a BatchNorm either
    assert f"{sum(before[key].numel() for key in heads):,} of" in distiller.describe_frozen()


@pytest.mark.parametrize("name", NANO)
def test_a_number_keeps_the_stem_and_so_many_stages(name):
    student = create_model(name, 10)
    number = len(student.feature_info) - 1
    before, depths = copy.deepcopy(student.state_dict()), student.parts()
    train_once(student, str(number))
    frozen = tuple(f"{key}." for part in depths[:number + 1] for block in part for key in block)
    kept = {key for key in before if f"{key}.".startswith(frozen)}
    assert not changed(student, before) & kept
    trained = {key for key, _ in student.named_parameters()} - kept
    assert trained & changed(student, before)
    assert {key for key, value in student.named_parameters() if value.requires_grad} == trained


def test_what_is_frozen_drops_no_path_and_goes_on_in_evaluation_mode():
    student = create_model("convnext_nano", 10, drop_path=0.9)
    distiller = Distiller(student, {}, {}, freeze="backbone")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = student.eval()(images)
        for _ in range(2):
            distiller.train()
            assert student.head.training and not student.stages[1].training
            assert torch.equal(student(images), expected)


def test_what_is_frozen_stays_so_when_batchnorms_are_synchronised():
    """Which gives them other modules under the same names."""
    distiller = Distiller(create_model("resnet_nano", 10), {}, {}, freeze="2")
    student = nn.SyncBatchNorm.convert_sync_batchnorm(distiller).train().student
    modes = {name: module.training for name, module in student.named_modules()
             if isinstance(module, nn.SyncBatchNorm)}
    assert modes["bn1"] is modes["layer2.0.bn2"] is False and modes["layer3.0.bn1"] is True


@pytest.mark.parametrize("what, sentence", [
    ("5", "backbone, or a number of stages, 0 to 4 .*got 5"), ("head", "got head"),
    ("-1", "got -1")])
def test_what_cannot_be_frozen_is_said(what, sentence):
    with pytest.raises(UserError, match=f"--freeze must be {sentence}" if "0 to" in sentence
                       else sentence):
        Distiller(create_model("resnet_nano", 10), {}, {}, freeze=what)


def test_a_network_without_names_of_its_layers_says_so():
    student = nn.Identity()
    student.classifiers, student.feature_info = (), ()
    with pytest.raises(UserError, match="--freeze backbone: Identity does not say"):
        Distiller(student, {}, {}, freeze="backbone")


# Recipes

RECIPES = sorted((Path(__file__).parent.parent / "run_scripts" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", [  # timm takes seconds to import
    pytest.param(path, marks=pytest.mark.slow if "timm model" in path.read_text() else ())
    for path in RECIPES], ids=lambda path: path.stem)
def test_recipes_describe_a_run(path):
    """Everything that a dry run builds, on ImageNet, without memory for weights."""
    if "timm model" in path.read_text():
        pytest.importorskip("timm")
    args = train_kd.build_parser().parse(["--config", str(path)])
    train_kd.check_flags(args)
    args = train_kd.resolve(args, torch.device("cpu"), train_size=1_281_167, num_classes=1000)
    assert args.steps_per_epoch == 1_281_167 // args.effective_batch
    infos = []
    for spec in (args.student, args.teacher):
        if spec != ["none"]:
            name, options = parse_spec(spec, "--student")
            with torch.device("meta"):
                model = create_model(name, 1000, **options)
            run_on_shapes(model, args.input_size)
            infos.append(model.feature_info)
    losses.create_losses(args.loss, infos[0], infos[1] if len(infos) > 1 else None)
    data.train_transform(args.input_size, auto_augment=args.aa, scale=args.scale)


def test_recipes_of_others_state_what_is_published():
    """And nothing else that looks like an accuracy."""
    found = {path.stem: set(re.findall(r"(\d\d\.\d+) %", path.read_text())) for path in RECIPES}
    assert {name: figures for name, figures in found.items() if figures} == {
        "deit3": {"81.4"}, "rsb_a2": {"79.8"}, "vanilla_kd": {"83.08", "85.03"}}
    for name in ("deit3", "rsb_a2", "vanilla_kd"):
        (path,) = [path for path in RECIPES if path.stem == name]
        assert "published" in path.read_text().lower() and "arXiv" in path.read_text()


# On the command line

SMALL = ["--teacher", "none", "--student", "resnet_nano", "--data-set", "outlines",
         "train_size=200", "val_size=20", "--input-size", "32", "--num-workers", "0", "--epochs",
         "5"]


@pytest.mark.parametrize("words, telling", [
    ([], ["effective batch 64 = 1 process(es) x 64 images x 1", "instead of the default 4096, to "
          "leave 200 images 10 updates per epoch", "--lr 0.004 was chosen for 4096",
          "in 1 updates, then", "warm-up of a tenth of the run instead of the default 20 epochs"]),
    (["--batch-size", "8", "--lr", "1e-3"], [
        "effective batch 16 = 1 process(es) x 8 images x 2", "many as --batch-size allows\n"]),
    (["--effective-batch", "128", "--warmup-epochs", "1"], ["effective batch 128 = "]),
    (["--freeze", "backbone"], ["frozen: 1,290 of the student's 310,746 parameters train"])])
def test_sizes_that_fit_and_what_trains_are_printed(words, telling, tmp_path, capsys):
    assert train_kd.main([*SMALL, *words, "--dry-run", "--output-dir", str(tmp_path / "x")]) == 0
    printed = capsys.readouterr().out
    for text in telling:
        assert text in printed, text
    if "--effective-batch" in words:
        assert "instead of the default" not in printed


@pytest.mark.parametrize("words, telling", [
    (["--effective-batch", "256"], "200 images, fewer than one effective batch of 256"),
    (["--accum-steps", "4"], "200 images, fewer than one effective batch of 256"),
    (["--batch-size", "256"], "200 images, fewer than one effective batch of 256"),
    (["--warmup-epochs", "6"], "the warm-up of 18 updates is longer than the run of 15"),
    (["--warmup-epochs", "1e308"], "--warmup-epochs 1e+308 is longer than the run of 5 epochs"),
    (["--config", "RECIPE"], "200 images, fewer than one effective batch of 4096"),
    (["--freeze", "9"], "--freeze must be backbone, or a number of stages, 0 to 4"),
    (["--freeze", "1", "--sparsity", "0.4"], "Leave one of them out"),
    (["--repeated-aug", "--mixup-mode", "pair"], "--repeated-aug makes them one image"),
    (["--sparsity", "0.4", "--growth", "momentum", "--opt", "sgd"], "which --opt sgd has not"),
    (["--momentum", "0.5"], "--momentum does nothing with --opt adamw"),
    (["--opt", "sgd", "--opt-eps", "1e-6"], "--opt-eps does nothing with --opt sgd"),
    (["--loss", "kd", "--bce"], "kd"),
    (["--aa", "4a"], "is none of none, ta, 3a")])
def test_what_was_chosen_and_does_not_fit_is_an_error(words, telling, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("effective-batch: 4096\n")
    words = [str(tmp_path / "recipe.yaml") if word == "RECIPE" else word for word in words]
    assert train_kd.main([*SMALL, *words, "--dry-run", "--output-dir", str(tmp_path / "x")]) == 2
    assert telling in capsys.readouterr().err
