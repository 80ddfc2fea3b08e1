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
    build_optimizer,
    cosine_schedule,
    fit_batch,
    optimizer_form,
    parameter_groups,
    restore_optimizer,
    set_hyperparameters,
)
from utils.registry import UserError

REFERENCE = read_json("schedules")
NANO = [name for name in list_models() if name.endswith("_nano")]
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


@pytest.mark.parametrize("name", NANO)
def test_layer_ids_cover_every_parameter_and_end_at_the_head(name):
    model = create_model(name, 10)
    ids = model.layer_ids()
    names = [key for key, _ in model.named_parameters()]
    assert set(ids) == set(names)
    assert min(ids.values()) == 0
    head = [f"{key}.{end}" for key in model.classifiers for end in ("weight", "bias")]
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


# One id per block, the last one for the head. As numbered by BEiT, Swin's authors and timm.
@pytest.mark.parametrize("name, last, some", [
    ("deit_s", 13, {"class_token": 0, "encoder.pos_embedding": 0, "conv_proj.weight": 0,
                    "encoder.layers.encoder_layer_3.ln_1.weight": 4, "encoder.ln.weight": 13}),
    ("swin_t", 13, {"features.0.2.weight": 0, "features.2.reduction.weight": 2,
                    "features.3.0.norm1.weight": 3, "features.5.5.norm1.weight": 10,
                    "features.6.norm.weight": 10, "features.7.0.norm1.weight": 11,
                    "norm.weight": 13}),
    ("cswin_t", 26, {"merge1.conv.weight": 1, "stage2.0.qkv.weight": 2,
                     "merge2.conv.weight": 3, "stage4.0.qkv.weight": 25, "norm.weight": 26}),
    ("efficientnet_b3", 27, {"features.0.0.weight": 0, "features.1.0.block.0.0.weight": 1,
                             "features.1.1.block.0.0.weight": 2, "features.8.0.weight": 26}),
    ("mobilenetv3_l", 17, {"features.1.block.0.0.weight": 1, "features.16.0.weight": 16,
                           "classifier.0.weight": 16})])
def test_layer_ids_of_blocks(name, last, some):
    with torch.device("meta"):
        ids = create_model(name).layer_ids()
    assert set(ids.values()) == set(range(last + 1))
    assert {key: ids[key] for key in some} == some


def test_a_network_without_named_blocks_refuses_layer_decay_in_words():
    class Unnamed(VisionModel):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

    for module in (Unnamed(), Distiller(Unnamed(), {}, {})):
        with pytest.raises(UserError, match="Unnamed does not name its stages and blocks, which "
                                            "--layer-decay"):
            parameter_groups(module, 0.05, 0.7)
        assert parameter_groups(module, 0.05, 1.0)


# The optimizer


def test_adamw_and_its_hyperparameters():
    groups = parameter_groups(micro_slak(), 0.05, 0.7)
    optimizer = build_optimizer("adamw", groups, lr=3e-3, betas=(0.8, 0.95), eps=1e-6)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {
        ((0.8, 0.95), 1e-6)}
    for lr, weight_decay in ((0.0, 0.0), (2e-3, 0.1)):  # a group whose decay was 0 decays again
        set_hyperparameters(optimizer, lr, weight_decay)
        for group, ours in zip(optimizer.param_groups, groups):
            assert group["lr"] == pytest.approx(lr * ours["lr_scale"])
            assert group["weight_decay"] == (weight_decay if ours["decays"] else 0.0)
    assert len({group["lr"] for group in optimizer.param_groups}) > 3


def updated(name: str, updates: int = 6, stop_at: int | None = None, **options) -> dict:
    """A small network after updates with fixed gradients; at `stop_at` its state and the
    optimizer's go through a checkpoint into new ones."""
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        return model, build_optimizer(name, parameter_groups(model, 0.1), lr=0.0, **options)

    model, optimizer = build()
    for step in range(updates):
        if step == stop_at:
            states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model, optimizer = build()
            model.load_state_dict(states[0])
            optimizer_form(optimizer, states[1], True)
            restore_optimizer(optimizer, states[1])
        set_hyperparameters(optimizer, 0.1 / (step + 1), 0.2)
        for key, parameter in model.named_parameters():
            values = torch.arange(parameter.numel()).add(step).sin().view(parameter.shape)
            parameter.grad = values * (1.0 if key.endswith("weight") else -2.0)
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("name, options", [
    ("adamw", {}), ("lamb", {}), ("sgd", {}), ("sgd", {"momentum": 0.0}),
    ("sgd", {"nesterov": False})])
def test_an_optimizer_goes_on_bit_for_bit(name, options):
    whole, stopped = updated(name, **options), updated(name, stop_at=3, **options)
    assert all(torch.equal(value, stopped[key]) for key, value in whole.items())


def test_optimizers_and_their_options_matter():
    runs = [updated(*words, **options) for words, options in (
        (("adamw",), {}), (("lamb",), {}), (("sgd",), {}), (("sgd",), {"momentum": 0.5}),
        (("sgd",), {"nesterov": False}), (("lamb",), {"betas": (0.5, 0.9)}),
        (("lamb",), {"eps": 0.1}))]
    assert len({run["0.weight"].sum().item() for run in runs}) == len(runs)


def test_lamb_steps_as_written():
    """Algorithm 2 of the paper in NumPy; what does not decay takes Adam's step."""
    groups = [{"params": [nn.Parameter(torch.tensor([3.0, -4.0]))], "decays": True},
              {"params": [nn.Parameter(torch.tensor([3.0, -4.0]))], "decays": False}]
    optimizer = build_optimizer("lamb", [{**group, "lr_scale": 1.0} for group in groups], lr=0.1,
                                betas=(0.8, 0.9), eps=1e-3)
    w, plain, m, v = np.array([3.0, -4.0]), np.array([3.0, -4.0]), np.zeros(2), np.zeros(2)
    for step in range(1, 5):
        set_hyperparameters(optimizer, 0.1, 0.5)
        gradient = np.array([np.sin(step), 2.0])
        for group in groups:
            group["params"][0].grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient ** 2
        ratio = (m / (1 - 0.8 ** step)) / (np.sqrt(v / (1 - 0.9 ** step)) + 1e-3)
        update = ratio + 0.5 * w
        w = w - 0.1 * np.linalg.norm(w) / np.linalg.norm(update) * update
        plain = plain - 0.1 * ratio
    for expected, group in zip((w, plain), groups):
        np.testing.assert_allclose(group["params"][0].detach().numpy(), expected, rtol=1e-5)


def test_lamb_moves_what_is_all_zero():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer("lamb", [{"params": [weight], "decays": True, "lr_scale": 1.0}],
                                lr=0.1)
    weight.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.1, 0.1]))


# Sizes that fit a small data set: images, per process, processes, effective, fixed -> both sizes


@pytest.mark.parametrize("sizes, expected", [
    ((1_281_167, 64, 1, 4096, False), (64, 4096)), ((40_960, 64, 8, 4096, False), (64, 4096)),
    ((9469, 64, 1, 4096, False), (64, 896)), ((9469, 64, 8, 4096, False), (64, 512)),
    ((200, 64, 1, 4096, False), (64, 64)), ((40, 64, 1, 4096, False), (32, 32)),
    ((40, 64, 1, 4096, True), (64, 64)), ((3, 64, 2, 4096, False), (2, 4)),
    ((5000, 256, 16, 4096, True), (256, 4096))])
def test_default_batches_fit_a_small_data_set(sizes, expected):
    *numbers, is_fixed = sizes
    assert fit_batch(*numbers, is_fixed=is_fixed) == expected


def test_adamw_steps_as_written():
    """The first step is lr against the gradient's sign, after a decay by lr * weight_decay."""
    model = nn.Linear(3, 2)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer("adamw", parameter_groups(model, 0.5), lr=1.0, eps=1e-12)
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
        return model, build_optimizer("adamw", parameter_groups(model, 0.1), lr=0.1)

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
