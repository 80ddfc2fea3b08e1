"""The published arrangement that the benchmarks compare with is the same function as ours."""
import copy

import pytest
import torch
from torch import nn

from analysis.benchmark.published import PUBLISHED_CLASSES, arranged, through_teacher
from losses import create_losses
from models import create_model
from models.distiller import Distiller
from models.resnet import ResNet
from tests.helpers import fill_by_name, micro_convnext_bn, micro_slak

BUILDERS = {"slak": micro_slak, "no layer scale": lambda: micro_slak(layer_scale_init=0.0),
            "whole kernels": lambda: micro_slak(decomposed=False),
            "no bn": lambda: micro_slak(bn=False), "convnext_bn": micro_convnext_bn}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", BUILDERS)
def test_same_function_and_gradients(name, mode):
    ours = fill_by_name(BUILDERS[name]()).train(mode == "train")
    theirs = arranged(ours)
    assert not {type(module) for module in theirs.modules()} & PUBLISHED_CLASSES.keys()
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert [*dict(theirs.named_parameters())] == [*dict(ours.named_parameters())]
    torch.manual_seed(0)
    images, labels = torch.randn(3, 3, 64, 64), torch.tensor([1, 2, 3])
    results = []
    for model in (ours, theirs):
        output = model.forward_with_features(images)
        nn.functional.cross_entropy(output.logits, labels).backward()
        results.append((output, {key: p.grad for key, p in model.named_parameters()},
                        dict(model.named_buffers())))
    for found, expected in zip(results[1], results[0]):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_drop_path_is_the_same():
    ours = fill_by_name(micro_slak(drop_path=0.5)).train()
    theirs = arranged(ours)
    images, found = torch.randn(4, 3, 32, 32), []
    for model in (ours, theirs):
        torch.manual_seed(1)
        found.append(model(images))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_maps_are_contiguous():
    model = arranged(fill_by_name(micro_slak()).to(memory_format=torch.channels_last))
    features = model.forward_with_features(torch.randn(2, 3, 64, 64)).features
    assert all(x.is_contiguous() for x in features)
    assert all(p.is_contiguous() for p in model.parameters())


def test_other_networks_are_copied():
    model = create_model("resnet_nano", 10)
    copied = arranged(model)
    assert isinstance(copied, ResNet) and copied is not model
    assert next(copied.parameters()) is not next(model.parameters())


def test_the_teacher_is_trained_through_but_the_loss_is_the_same():
    teacher, student = arranged(fill_by_name(micro_slak())).eval(), micro_convnext_bn()
    distiller = Distiller(student, *create_losses([["nkd"]], student.feature_info,
                                                  teacher.feature_info))
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    output = teacher.forward_with_features(images)
    student.eval()
    total, terms, logits = through_teacher(distiller)(images, labels, output)
    plain, _, expected_logits = distiller(images, labels, output)
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(logits, expected_logits)
    before = copy.deepcopy(torch.autograd.grad(plain, [*student.parameters()]))
    total.backward()
    for parameter, gradient in zip(student.parameters(), before):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(p.grad is not None for p in teacher.parameters())
    assert output.logits.grad_fn is not None and terms["nkd"] > 0
