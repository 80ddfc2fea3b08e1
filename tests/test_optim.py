"""Schedules, parameter groups, layer decay and the moving average."""
import copy

import numpy as np
import pytest
import torch
from torch import nn

from losses import create_loss
from models import VisionModel, create_model, list_models
from models.distiller import Distiller
from tests.helpers import micro_slak, read_json
from utils.optim import (
    ModelEma,
    build_adamw,
    cosine_schedule,
    parameter_groups,
    restore_optimizer,
    set_hyperparameters,
)
from utils.registry import UserError

REFERENCE = read_json("schedules")
NANO = [name for name in list_models() if name.endswith("_nano")]
REFUSING = [name for name in NANO
            if type(create_model(name, 10)).layer_ids is VisionModel.layer_ids]
STEPS_PER_EPOCH = 312  # 1,281,167 images at batch 4096

# Schedules


@pytest.mark.parametrize("epochs", [300, 120])
def test_learning_rate_equals_the_published_one(epochs):
    rate = cosine_schedule(4e-3, 1e-6, epochs * STEPS_PER_EPOCH, 20 * STEPS_PER_EPOCH)
    expected = REFERENCE[f"lr_{epochs}ep"]
    found = [rate(int(step)) for step in expected]
    assert found == pytest.approx(list(expected.values()), rel=1e-9)
    assert rate(0) == 0
    assert rate(epochs * STEPS_PER_EPOCH) == pytest.approx(1e-6, rel=1e-9)


def test_a_short_schedule_equals_the_published_one_in_full():
    rate = cosine_schedule(1e-3, 1e-5, 35, 7)
    assert len(REFERENCE["lr_small"]) == 35
    assert [rate(step) for step in range(35)] == pytest.approx(REFERENCE["lr_small"], rel=1e-9)


def test_schedules_without_warmup_of_one_step_and_constant():
    assert cosine_schedule(1.0, 0.0, 10)(0) == 1.0
    assert cosine_schedule(1.0, 0.0, 10)(5) == pytest.approx(0.5)
    assert [cosine_schedule(1.0, 0.0, 3, 1)(step) for step in (0, 1)] == [0.0, 1.0]
    assert {cosine_schedule(0.05, 0.05, 7)(step) for step in range(8)} == {0.05}
    warmup_only = cosine_schedule(1.0, 0.0, 4, 4)
    assert [warmup_only(step) for step in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("warmup_steps", [11, -1])
def test_a_warmup_longer_than_the_run_is_refused(warmup_steps):
    with pytest.raises(UserError, match=f"{warmup_steps} updates.*10; lower --warmup-epochs"):
        cosine_schedule(1.0, 0.0, 10, warmup_steps)


# Parameter groups


@pytest.mark.parametrize("figure, layer_decay", [("plain", 1.0), ("layer_decay_0_7", 0.7)])
def test_groups_equal_the_published_ones(figure, layer_decay):
    model = micro_slak()
    groups = parameter_groups(model, 0.05, layer_decay)
    references = REFERENCE["param_groups"][figure]
    assert len(groups) == len(references)
    parameters = dict(model.named_parameters())
    for group, expected in zip(groups, references):
        assert group["names"] == expected["names"]
        assert group["weight_decay"] == expected["weight_decay"]
        assert group["decays"] == (expected["weight_decay"] > 0)
        assert group["lr_scale"] == pytest.approx(expected["lr_scale"], rel=1e-9)
        assert all(parameter is parameters[name]
                   for name, parameter in zip(group["names"], group["params"]))


@pytest.mark.parametrize("name", NANO)
def test_groups_hold_every_trainable_parameter_once(name):
    model = create_model(name, 10)
    frozen = next(iter(dict(model.named_parameters())))
    model.get_parameter(frozen).requires_grad_(False)
    groups = parameter_groups(model, 0.05)
    names = [key for group in groups for key in group["names"]]
    assert sorted(names) == sorted(key for key, _ in model.named_parameters() if key != frozen)
    for group in groups:
        assert group["lr_scale"] == 1.0
        for key, parameter in zip(group["names"], group["params"]):
            exempt = ".grn." in key or key.endswith((".bias", "_token", "pos_embedding",
                                                     "position_bias_table"))
            assert group["decays"] == (parameter.dim() > 1 and not exempt)


class WithToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.weight = nn.Parameter(torch.zeros(4, 4))
        self.table = nn.ParameterDict({"bias": torch.zeros(4, 4)})

    def no_weight_decay(self) -> set[str]:
        return {"token"}


def test_biases_of_any_shape_and_what_the_model_exempts_do_not_decay():
    decaying = [group["names"] for group in parameter_groups(WithToken(), 0.05) if group["decays"]]
    assert decaying == [["weight"]]


def test_a_distiller_keeps_the_students_exemptions_and_scales_the_losses_as_the_head():
    student = create_model("convnext_nano", 10)
    student.no_weight_decay = lambda: {"head.weight"}
    fd = create_loss("fd", student.feature_info, student.feature_info)
    distiller = Distiller(student, {"fd": fd}, {"fd": 1.0})
    groups = parameter_groups(distiller, 0.05, 0.5)
    group_of = {name: group for group in groups for name in group["names"]}
    assert set(group_of) == {name for name, _ in distiller.named_parameters()}
    projection = group_of["losses.fd.projections.0.weight"]
    assert projection["lr_scale"] == 1.0 and projection["decays"]
    assert not group_of["student.head.weight"]["decays"]
    assert group_of["student.head.weight"]["lr_scale"] == 1.0
    assert group_of["student.downsample_layers.0.0.weight"]["lr_scale"] == 0.5 ** 13


@pytest.mark.parametrize("layer_decay", [0.0, -0.5, 1.1])
def test_layer_decay_out_of_range_is_refused(layer_decay):
    with pytest.raises(UserError, match=rf"--layer-decay must lie in \(0, 1\], got {layer_decay}"):
        parameter_groups(micro_slak(), 0.05, layer_decay)


# Layer ids


@pytest.mark.parametrize("name", [name for name in NANO if name not in REFUSING])
def test_layer_ids_cover_every_parameter_and_end_at_the_head(name):
    model = create_model(name, 10)
    ids = model.layer_ids()
    names = [key for key, _ in model.named_parameters()]
    assert set(ids) == set(names)
    assert min(ids.values()) == 0
    head = [key for key in names if key.startswith(("head.", "fc."))]
    assert {ids[key] for key in head} == {max(ids.values())}
    groups = parameter_groups(model, 0.05, 0.9)
    assert max(group["lr_scale"] for group in groups) == 1.0
    assert min(group["lr_scale"] for group in groups) == pytest.approx(0.9 ** max(ids.values()))


@pytest.mark.parametrize("name, num_blocks", [("resnet18", 8), ("resnet50", 16)])
def test_layer_ids_of_resnets_grow_with_depth(name, num_blocks):
    with torch.device("meta"):
        model = create_model(name)
    ids = model.layer_ids()
    in_order = [ids[key] for key, _ in model.named_parameters()]  # stem, blocks, classifier
    assert in_order == sorted(in_order)
    assert set(in_order) == set(range(num_blocks + 2))
    assert ids["conv1.weight"] == ids["bn1.bias"] == 0
    assert ids["layer1.0.conv1.weight"] == ids["layer1.0.downsample.0.weight"
                                               if name == "resnet50" else "layer1.0.bn2.bias"] == 1
    assert ids["layer4.1.bn1.weight"] == num_blocks - (name == "resnet50")
    assert ids["fc.weight"] == ids["fc.bias"] == num_blocks + 1


def test_layer_ids_of_a_27_block_stage():
    with torch.device("meta"):
        ids = create_model("convnext_s").layer_ids()
    assert [ids[f"stages.2.{block}.gamma"] for block in range(27)] == [
        3 + block // 3 for block in range(27)]
    assert [ids[f"downsample_layers.{i}.1.weight"] for i in range(4)] == [0, 2, 3, 12]
    assert [ids[f"stages.{i}.0.gamma"] for i in (0, 1, 3)] == [1, 2, 12]
    assert ids["norm.weight"] == ids["head.weight"] == 13


@pytest.mark.parametrize("name", REFUSING)
def test_models_without_layer_ids_refuse_layer_decay_in_words(name):
    model = create_model(name, 10)
    for module in (model, Distiller(model, {}, {})):
        with pytest.raises(UserError, match=f"--layer-decay is not defined for "
                                            f"{type(model).__name__}.*Leave --layer-decay at 1"):
            parameter_groups(module, 0.05, 0.7)
    assert parameter_groups(model, 0.05, 1.0)


# The optimizer


def test_adamw_and_its_hyperparameters():
    groups = parameter_groups(micro_slak(), 0.05, 0.7)
    optimizer = build_adamw(groups, lr=3e-3, betas=(0.8, 0.95), eps=1e-6)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {
        ((0.8, 0.95), 1e-6)}
    for lr, weight_decay in ((0.0, 0.0), (2e-3, 0.1)):  # a group whose decay was 0 decays again
        set_hyperparameters(optimizer, lr, weight_decay)
        for group, ours in zip(optimizer.param_groups, groups):
            assert group["lr"] == pytest.approx(lr * ours["lr_scale"])
            assert group["weight_decay"] == (weight_decay if ours["decays"] else 0.0)
    assert len({group["lr"] for group in optimizer.param_groups}) > 3


def test_adamw_steps_as_written():
    """The first step is lr against the gradient's sign, after a decay by lr * weight_decay."""
    model = nn.Linear(3, 2)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = build_adamw(parameter_groups(model, 0.5), lr=1.0, betas=(0.9, 0.999), eps=1e-12)
    set_hyperparameters(optimizer, 0.1, 0.5)
    (model.weight.sum() - model.bias.sum()).backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before["weight"] * (1 - 0.1 * 0.5) - 0.1)
    torch.testing.assert_close(model.bias.detach(), before["bias"] + 0.1)


# The moving average


class WithBuffers(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.register_buffer("running", torch.tensor([1.0, 2.0]))
        self.register_buffer("count", torch.tensor(3))


def set_values(model: nn.Module, **values) -> None:
    with torch.no_grad():
        for name, value in values.items():
            getattr(model, name).copy_(torch.as_tensor(value))


def test_average_under_a_mask_equals_the_published_one(fixture_npz):
    """Zero where the mask dropped a weight, the value itself where it grew one."""
    expected = {key: torch.as_tensor(value) for key, value in fixture_npz("ema_mask").items()}
    model = WithBuffers(expected["ema0_weight"].clone(), expected["ema0_bias"].clone())
    ema = ModelEma(model, float(expected["decay"]))
    set_values(model, weight=expected["weight"], bias=expected["bias"])
    mask = expected["mask"].bool()
    ema.update(model, {"weight": mask})
    assert (ema.model.weight[~mask] == 0).all() and mask.sum() < mask.numel()
    torch.testing.assert_close(ema.model.weight.data, expected["ema1_weight"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(ema.model.bias.data, expected["ema1_bias"], rtol=1e-5, atol=1e-8)
    grown = mask & (expected["ema0_weight"] == 0)
    assert grown.any() and torch.equal(ema.model.weight[grown], expected["weight"][grown])


def test_average_of_buffers_and_counters():
    model = WithBuffers(torch.zeros(2), torch.zeros(2))
    ema = ModelEma(model, 0.75)
    set_values(model, weight=[4.0, 8.0], running=[5.0, 2.0], count=9)
    ema.update(model)
    assert ema.model.weight.tolist() == [1.0, 2.0]
    assert ema.model.running.tolist() == [2.0, 2.0]
    assert ema.model.count.item() == 9 and ema.model.count.dtype == torch.int64


def test_average_of_a_network_follows_its_batchnorm():
    model = create_model("resnet_nano", 10).train()
    ema = ModelEma(model, 0.9)
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32))
    ema.update(model)
    mean = model.bn1.running_mean
    assert mean.any()
    torch.testing.assert_close(ema.model.bn1.running_mean, 0.1 * mean)
    assert ema.model.bn1.num_batches_tracked == 1


def test_the_averaged_model_stands_apart():
    model = micro_slak().train()
    ema = ModelEma(model, 0.5)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in ema.model.modules())
    assert not any(p.requires_grad for p in ema.model.parameters())
    before = ema.model.head.weight.clone()
    set_values(model.head, weight=torch.ones_like(before))
    assert torch.equal(ema.model.head.weight, before)
    ema.update(model)
    torch.testing.assert_close(ema.model.head.weight, (before + 1) / 2)
    assert (model.head.weight == 1).all()


def test_warmup_starts_with_a_small_decay():
    model = WithBuffers(torch.zeros(1), torch.zeros(1))
    ema = ModelEma(model, 0.25, warmup=True)
    expected = 0.0
    for n, decay in enumerate((1 / 10, 2 / 11, 0.25, 0.25)):  # (1 + n) / (10 + n), at most 0.25
        set_values(model, weight=[n + 1.0])
        ema.update(model)
        expected = decay * expected + (1 - decay) * (n + 1)
        assert ema.model.weight.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("warmup", [True, False])
def test_a_restored_average_goes_on_as_if_never_stopped(warmup):
    torch.manual_seed(0)
    model = create_model("resnet_nano", 10)
    running = ModelEma(model, 0.99, warmup)
    for step in range(4):
        if step == 2:
            resumed = ModelEma(create_model("resnet_nano", 10), 0.99, warmup)
            resumed.model.load_state_dict(running.model.state_dict())
            resumed.num_updates = running.num_updates
        set_values(model.fc, weight=torch.randn_like(model.fc.weight))
        running.update(model)
        if step >= 2:
            resumed.update(model)
    for name, value in running.model.state_dict().items():
        np.testing.assert_array_equal(resumed.model.state_dict()[name], value)


def test_moments_take_the_layout_of_their_parameter_when_restored():
    """A run may be continued with the other --channels-last; the fused kernel reads raw memory."""
    def build(layout):
        torch.manual_seed(0)
        model = torch.nn.Conv2d(4, 6, 3).to(memory_format=layout)
        return model, build_adamw(parameter_groups(model, 0.1), lr=0.1, betas=(0.9, 0.999),
                                  eps=1e-8)

    def update(model, optimizer, scale):
        for parameter in model.parameters():
            values = torch.arange(parameter.numel()).sin().view(parameter.shape) * scale
            parameter.grad = torch.empty_like(parameter).copy_(values)
        optimizer.step()

    model, optimizer = build(torch.channels_last)
    update(model, optimizer, 1.0)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    update(model, optimizer, 0.5)
    resumed, its_optimizer = build(torch.contiguous_format)
    resumed.load_state_dict(saved[0])
    restore_optimizer(its_optimizer, saved[1])
    update(resumed, its_optimizer, 0.5)
    torch.testing.assert_close(resumed.weight, model.weight.contiguous(), rtol=1e-6, atol=1e-6)
