"""What keeping only the likeliest classes of a teacher changes in a loss, as the benchmark says."""
import math

import pytest
import torch
import torch.nn.functional as F

from analysis.benchmark import kept_logits
from analysis.benchmark.kept_logits import DEFAULT_LOSSES, Sums, measure
from losses import create_losses, warn_of_softening
from models import create_model
from tests.helpers import make_state

CLASSES = 12


def terms_of(*specs: list[str]) -> dict[str, torch.nn.Module]:
    return {" ".join(spec): loss for spec in specs
            for loss in create_losses([spec], (), ())[0].values()}


def batches(number: int = 3) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, CLASSES, generator=generator),
             3 * torch.randn(8, CLASSES, generator=generator),
             torch.randn(8, CLASSES, generator=generator).softmax(1)) for _ in range(number)]


def test_changes_are_those_of_the_formula():
    """KL with the k largest and the even rest, written out for all images at once."""
    result = measure(batches(), terms_of(["kd", "alpha=1"]), [2, 5])
    student, teacher, _ = (torch.cat(parts).double() for parts in zip(*batches()))
    prob = teacher.softmax(1)
    gradient = (student.softmax(1) - prob) / 8  # of a batch's mean
    for top in (2, 5):
        limit = prob.sort(1, descending=True).values[:, top - 1:top]
        rest = prob.masked_fill(prob >= limit, 0).sum(1, keepdim=True)
        kept = prob.where(prob >= limit, rest / (CLASSES - top))
        kl, kept_kl = (F.kl_div(student.log_softmax(1), p, reduction="batchmean")
                       for p in (prob, kept))
        found = result.sums["kd alpha=1", top].changes()
        assert result.kept[top] == pytest.approx(1 - rest.mean().item(), abs=1e-6)
        assert found["loss"] == pytest.approx(((kept_kl - kl) / kl).item(), rel=0.01)
        difference = (kept - prob) / 8
        assert found["gradient"] == pytest.approx((difference.norm() / gradient.norm()).item(),
                                                  rel=0.01)
        cosine = F.cosine_similarity(gradient.flatten(), (gradient - difference).flatten(), dim=0)
        assert found["cosine"] == pytest.approx(cosine.item(), abs=1e-4)


def test_more_classes_change_less():
    names = [" ".join(spec) for spec in DEFAULT_LOSSES]
    result = measure(batches(), terms_of(*DEFAULT_LOSSES), [1, 4, 11])
    for name in names:
        changes = [result.sums[name, top].changes() for top in (1, 4, 11)]
        assert changes[0]["gradient"] > changes[1]["gradient"] > changes[2]["gradient"], name
        assert changes[2]["gradient"] < 0.01 and abs(changes[2]["loss"]) < 0.01


def test_an_unchanged_loss_has_no_change():
    sums, gradient = Sums(), torch.randn(4, CLASSES).double()
    for _ in range(2):
        sums.add((torch.tensor(2.0), gradient), (torch.tensor(2.0), gradient))
    assert sums.changes() == pytest.approx({"loss": 0, "gradient": 0, "cosine": 1})
    assert all(math.isnan(value) for value in Sums().changes().values())


def test_a_softened_teacher_of_few_classes_is_a_warning(capsys):
    warn_of_softening(terms_of(["nkd"]), top=3)
    warn_of_softening(terms_of(["kd", "temperature=4"]), top=0)
    assert not capsys.readouterr().out
    warn_of_softening(terms_of(["nkd"], ["kd", "temperature=4"]), top=3)
    assert "--loss kd temperature=4 softens" in capsys.readouterr().out


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "run" / "checkpoint.pth"
    path.parent.mkdir()
    torch.manual_seed(1)  # not the weights that the network would begin with
    state = make_state(create_model("resnet_nano", 10), {"ce": {}}, None)
    torch.save({**state.state_dict(), "args": {"student": ["resnet_nano"], "num_classes": 10,
                                               "input_size": 32}}, path)
    return str(path)


WORDS = ["--data-set", "outlines", "val_size=20", "--num-workers", "0", "--batch-size", "8"]


def test_the_command_prints_the_tables(checkpoint, capsys):
    assert kept_logits.main([*WORDS, "--checkpoint", checkpoint, "--top", "1", "3"]) == 0
    printed = capsys.readouterr().out
    assert "run teaches run with random weights: 20 images at 32 px" in printed
    tables = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(tables) == 3 + 3 * (2 + len(DEFAULT_LOSSES))
    assert all(math.isfinite(float(cell)) for line in tables[5:5 + len(DEFAULT_LOSSES)]
               for cell in line.split("|")[2:4])
    assert kept_logits.main([*WORDS, "--checkpoint", checkpoint, checkpoint, "--top", "1", "--loss",
                             "nkd", "--mixup", "0", "--cutmix", "0", "--images", "8"]) == 0
    assert "checkpoint (2): 8 images" in capsys.readouterr().out


@pytest.mark.parametrize("words, telling", [
    (["--top", "10"], "--top 10 of 10 classes leaves nothing out"),
    (["--loss", "ce"], "--loss here takes losses of the teacher's logits"),
    (["--loss", "fd"], "--loss here takes losses of the teacher's logits"),
    (["--model", "resnet_nano", "--weights", "random", "--num-classes", "9"],
     "and resnet_nano, random has 9; losses compare the same ones")])
def test_what_does_not_go_together_is_said(words, telling, checkpoint, capsys):
    assert kept_logits.main([*WORDS, "--checkpoint", checkpoint, *words]) == 2
    error = capsys.readouterr().err
    assert telling in error and "Traceback" not in error
