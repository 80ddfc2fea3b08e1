"""Masks: what they cover, what stays zero, what moves, and what a checkpoint keeps."""
import copy
import json
import math

import pytest
import torch
from torch import nn

import engine
import train_kd
from models import create_model, list_models
from models.distiller import FrozenTeacher
from models.sparsity import (
    FINAL_PRUNE_RATE,
    SparseMask,
    draw_masks,
    erk_densities,
    gradient_growth,
    magnitude_prune,
    maskable,
    snip_densities,
    starting_masks,
)
from tests.helpers import (
    fill_by_name,
    make_batch,
    make_options,
    make_state,
    micro_slak,
    no_mix,
    read_json,
)
from utils import optim
from utils.checkpoint import load_file, save_atomically
from utils.registry import UserError

REFERENCE = read_json("sparse")
PRECISIONS = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def batch(fixture_npz) -> tuple[torch.Tensor, torch.Tensor]:
    arrays = fixture_npz("snip_batch")
    return torch.as_tensor(arrays["images"]), torch.as_tensor(arrays["labels"])


@pytest.fixture
def layer(fixture_npz) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value) for name, value in fixture_npz("prune_grow").items()}


# Numbers of the published code


def test_what_may_be_masked_is_the_published_list():
    weights = maskable(micro_slak())
    assert list(weights) == REFERENCE["maskable"]
    assert sum(weight.numel() for weight in weights.values()) == REFERENCE["total_maskable"]


def test_snip_densities_equal_the_published_ones(batch):
    model = fill_by_name(micro_slak())
    before = copy.deepcopy(model.state_dict())
    densities = snip_densities(model, maskable(model), *batch, 0.6)
    weights = maskable(model)
    assert list(densities) == list(REFERENCE["snip_density_0_6"])
    for name, expected in REFERENCE["snip_density_0_6"].items():
        assert densities[name] == pytest.approx(expected, abs=1e-9), name
    kept = sum(density * weights[name].numel() for name, density in densities.items())
    assert round(kept) == int(0.6 * REFERENCE["total_maskable"]) - 1  # strictly above the threshold
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("key, build", [
    ("erk_density_0_6_micro", micro_slak),
    ("erk_density_0_6_SLaK_tiny_51", lambda: create_model("slak_t", 1000))])
def test_erk_densities_equal_the_published_ones(key, build):
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in maskable(build()).items()}
    densities = erk_densities(shapes, 0.6)
    assert densities == pytest.approx(REFERENCE[key], rel=1e-9)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(densities[name] * sizes[name] for name in shapes)
    assert total == pytest.approx(0.6 * sum(sizes.values()), rel=1e-9)


def test_prune_and_growth_equal_the_published_ones(layer):
    """`mask` in the published type, float, gives masks of that type."""
    pruned = magnitude_prune(layer["weight"], layer["mask"], float(layer["prune_rate"]))
    assert torch.equal(pruned, layer["pruned_mask"])
    grown = gradient_growth(pruned, layer["grad"], int(layer["removed"]))
    assert torch.equal(grown, layer["grown_mask_gradient"].float())
    assert grown.sum() == layer["mask"].sum()


def test_prune_rate_equals_the_published_one():
    model = micro_slak()
    sparsity = SparseMask(model, torch.optim.AdamW(model.parameters()), prune_rate=0.5,
                          total_steps=93_600)
    for step, expected in read_json("schedules")["prune_rate_0_5_over_93600"].items():
        assert sparsity.prune_rate_at(int(step)) == pytest.approx(expected, rel=1e-9)


# Prune and grow


@pytest.mark.parametrize("rate, removed", [(0.0, 0), (0.01, 1), (0.3, 6), (1.0, 20)])
def test_prune_rounds_up_and_ties_do_not_change_the_count(rate, removed):
    mask = torch.arange(40).view(5, 8) < 20
    for weight in (torch.arange(40.0).view(5, 8), torch.zeros(5, 8)):
        pruned = magnitude_prune(weight, mask, rate)
        assert pruned.dtype is torch.bool and not (pruned & ~mask).any()
        assert mask.sum() - pruned.sum() == removed
    assert mask.sum() == 20  # not in place


def test_growth_of_more_than_there_is_room_for_is_refused():
    with pytest.raises(UserError, match="cannot grow 5 weights: 4 are masked"):
        gradient_growth(torch.arange(8).view(2, 4) < 4, torch.ones(2, 4), 5)


class Exempt(nn.Module):
    """GRN's scale is four-dimensional and no weight of the kind that is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.pwconv = nn.Linear(8, 8)
        self.grn = nn.Parameter(torch.zeros(1, 1, 1, 8))
        self.frozen = nn.Parameter(torch.ones(8, 8), requires_grad=False)
        self.table = nn.Parameter(torch.ones(2, 3, 4))

    def no_weight_decay(self) -> set[str]:
        return {"grn"}


def test_what_the_model_exempts_and_what_does_not_train_is_not_masked():
    assert list(maskable(Exempt())) == ["pwconv.weight"]


def test_large_kernels_alone():
    names = list(maskable(micro_slak(), "large-kernel"))
    assert len(names) == 10
    assert all(".LoRA1." in name or ".LoRA2." in name for name in names)
    whole = micro_slak(decomposed=False)
    assert all(".lkb_origin." in name for name in maskable(whole, "large-kernel"))
    with pytest.raises(UserError, match="ResNet has no large kernels"):
        maskable(create_model("resnet_nano", 10), "large-kernel")
    with pytest.raises(UserError, match="must be one of all, large-kernel; got 'most'"):
        maskable(micro_slak(), "most")


def no_batch() -> tuple:
    raise AssertionError("no batch is needed")


def test_masks_have_the_exact_number_per_layer_and_dense_layers_have_none(batch):
    model = fill_by_name(micro_slak())
    weights = maskable(model)
    masks = starting_masks(model, weights, init="erk", density=0.6, first_batch=no_batch, seed=0)
    densities = REFERENCE["erk_density_0_6_micro"]
    assert set(masks) == {name for name in weights if densities[name] < 0.99}
    for name, mask in masks.items():
        assert mask.sum() == round(densities[name] * mask.numel()), name
    others = draw_masks({name: mask.shape for name, mask in masks.items()}, densities, seed=1)
    assert all(others[name].sum() == mask.sum() for name, mask in masks.items())
    assert sum(not torch.equal(others[name], mask) for name, mask in masks.items()) > 20
    drawn = starting_masks(model, weights, init="snip", density=0.6, first_batch=lambda: batch,
                           seed=0)
    kept = starting_masks(model, weights, init="snip-mask", density=0.6,
                          first_batch=lambda: batch, seed=0)
    assert set(drawn) == set(kept) == set(REFERENCE["snip_density_0_6"])
    for name in drawn:
        assert drawn[name].sum() == kept[name].sum()
        # What SNIP ranks highest is mostly what is large.
        size = weights[name].detach().abs()
        assert size[kept[name]].mean() > size[~kept[name]].mean()


def test_snip_without_a_gradient_is_refused(batch):
    model = micro_slak()
    with torch.no_grad():
        model.head.weight.zero_()
    with pytest.raises(UserError, match=r"SNIP cannot choose 60.0% .* only \d.* erk"):
        snip_densities(model, maskable(model), *batch, 0.6)


@pytest.mark.parametrize("name", [name for name in list_models() if name.endswith("_nano")])
def test_erk_masks_a_network_of_every_kind(name):
    model = create_model(name, 10)
    weights = maskable(model)
    masks = starting_masks(model, weights, init="erk", density=0.6, first_batch=no_batch, seed=0)
    live = sum(int(mask.sum()) - mask.numel() for mask in masks.values())
    total = sum(weight.numel() for weight in weights.values())
    assert 1 + live / total == pytest.approx(0.6, abs=0.01)


def test_snip_does_not_depend_on_what_was_drawn_before(batch):
    """Drop path in it is seeded."""
    model = fill_by_name(micro_slak(drop_path=0.5))
    masks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        masks.append(starting_masks(model, maskable(model), init="snip-mask", density=0.6,
                                    first_batch=lambda: batch, seed=0))
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def test_no_layer_may_be_left_without_a_weight_and_none_masked_at_all(batch):
    model = fill_by_name(micro_slak())
    for density, words in ((0.001, "leaves .* layer.s. without a weight, .*erk"),
                           (0.995, "0.005 masks nothing")):
        with pytest.raises(UserError, match=words):
            starting_masks(model, maskable(model), init="uniform", density=density,
                           first_batch=no_batch, seed=0)


@pytest.mark.parametrize("init, density, words", [
    ("snap", 0.6, "must be one of snip, snip-mask, erk, uniform, weights; got 'snap'"),
    ("erk", 0.0, r"--sparsity must lie in \(0, 1\)"), ("erk", 1.5, "got -0.5"),
    ("weights", 0.6, "0.0% of its weights.*dense.*snip or erk"),
])
def test_starts_that_make_no_sense(init, density, words):
    model = micro_slak()
    with pytest.raises(UserError, match=words):
        starting_masks(model, maskable(model), init=init, density=density, first_batch=no_batch,
                       seed=0)


@pytest.mark.parametrize("options, words", [
    ({"growth": "fast"}, "--growth must be one of random, gradient, momentum; got 'fast'"),
    ({"prune_rate": 0.0}, r"--prune-rate must lie in \[0.005, 1\], got 0.0.*--prune-every 0"),
    ({"prune_rate": 1.5}, "got 1.5"), ({"layers": "some"}, "got 'some'")])
def test_wrong_words_and_rates_are_refused(options, words):
    model = micro_slak()
    with pytest.raises(UserError, match=words):
        SparseMask(model, torch.optim.AdamW(model.parameters()), total_steps=10, **options)


# Training under masks


def test_masked_weights_are_zero_from_the_start_on():
    state = sparse_state()
    average = dict(state.ema.model.named_parameters())
    for name, mask in state.sparsity.masks.items():
        assert (state.sparsity.weights[name][~mask] == 0).all()
        assert (average[name][~mask] == 0).all()


def test_what_will_happen_is_described():
    text = sparse_state(total_steps=100, prune_every=10, growth="gradient").sparsity.describe()
    assert "they change 9 times, every 10 updates, by a share of 0.3 -> 0.005 (gradient" in text
    for options in ({"prune_every": 0}, {"total_steps": 5, "prune_every": 10}):
        assert "they never change" in sparse_state(**options).sparsity.describe()


def sparse_state(*, start: str = "erk", total_steps: int = 100, prune_every: int = 2,
                 growth: str = "random", fp16_scaler: bool = False, layer_decay: float = 1.0,
                 model: nn.Module | None = None, **options) -> engine.TrainState:
    model = model or fill_by_name(micro_slak())
    state = make_state(model, {"ce": {}}, None, fp16_scaler=fp16_scaler)
    state.optimizer = optim.build_optimizer(
        "adamw", optim.parameter_groups(state.distiller, 0.05, layer_decay), lr=1e-2)
    state.sparsity = SparseMask(model, state.optimizer, total_steps=total_steps, growth=growth,
                                prune_every=prune_every, **options)
    if start:
        state.sparsity.start(start, 0.6, no_batch)
    state.ema = engine.ModelEma(model, 0.9)
    if fp16_scaler:  # not so high that the first updates are skipped
        state.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    return state


def update(state: engine.TrainState, number: int = 1, seed: int = 0, **options) -> None:
    options = make_options(**options)
    state.wrapped.train()
    for _ in range(number):
        rng = torch.Generator().manual_seed(1000 * seed + state.step)
        batches = iter([make_batch(torch.randn(2, 3, 32, 32, generator=rng),
                                   torch.randint(0, 10, (2,), generator=rng))
                        for _ in range(options.accum_steps)])
        engine.accumulate_gradients(state, batches, None, no_mix, options)
        engine.optimizer_update(state, options.clip_grad)


def moments(state: engine.TrainState, name: str) -> list[torch.Tensor]:
    values = state.optimizer.state[state.sparsity.weights[name]]
    return [values["exp_avg"], values["exp_avg_sq"]]


def assert_sparse(state: engine.TrainState, counts: dict[str, int]) -> None:
    """Weights, averages and moments are exactly 0 where masked, and as many live as ever."""
    average = dict(state.ema.model.named_parameters())
    for name, mask in state.sparsity.masks.items():
        assert mask.sum() == counts[name], name
        for tensor in (state.sparsity.weights[name], average[name], *moments(state, name)):
            assert (tensor[~mask] == 0).all(), name


@pytest.mark.parametrize("growth", ["random", "gradient"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", [
    {}, {"accum_steps": 2, "clip_grad": 0.1, "memory_format": torch.contiguous_format}])
def test_masked_weights_are_zero_after_every_update(precision, growth, options):
    state = sparse_state(growth=growth, fp16_scaler=precision == "fp16", layer_decay=0.7)
    masks = {name: mask.clone() for name, mask in state.sparsity.masks.items()}
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    density = state.sparsity.density
    assert density == pytest.approx(0.6, abs=1e-3)
    for _ in range(4):
        update(state, amp_dtype=PRECISIONS[precision], **options)
        assert_sparse(state, counts)
        assert state.sparsity.density == density
    assert state.sparsity.num_changes == 2
    assert any(not torch.equal(mask, masks[name]) for name, mask in state.sparsity.masks.items())
    total = sum(int((weight != 0).sum()) for weight in state.sparsity.weights.values())
    assert total < state.sparsity.num_maskable * 0.61


def test_a_compiled_step_keeps_its_zeros():
    state = sparse_state(model=create_model("slak_pico", 10, depths=(1, 1), dims=(8, 16)))
    state.distiller.compile(backend="aot_eager")
    counts = {name: int(mask.sum()) for name, mask in state.sparsity.masks.items()}
    update(state, 3)
    assert_sparse(state, counts)


@pytest.mark.parametrize("growth", ["random", "gradient", "momentum"])
def test_new_weights_start_from_nothing_and_then_learn(growth):
    state = sparse_state(start="uniform", growth=growth, prune_every=3)
    update(state, 2)
    old = {name: mask.clone() for name, mask in state.sparsity.masks.items()}
    update(state)
    num_grown = 0
    for name, mask in state.sparsity.masks.items():
        grown, dropped = mask & ~old[name], old[name] & ~mask
        num_grown += int(grown.sum())
        rate = state.sparsity.prune_rate_at(3)
        assert dropped.sum() == grown.sum() == math.ceil(rate * int(old[name].sum())), name
        weight = state.sparsity.weights[name]
        for tensor in (weight, *moments(state, name)):
            assert (tensor[grown] == 0).all(), name
        assert (weight[dropped] == 0).all()
    assert num_grown > 1000
    new = {name: mask & ~old[name] for name, mask in state.sparsity.masks.items()}
    update(state)
    for name, grown in new.items():  # depthwise, a map of 1x1 meets the middle of the kernel only
        alive = (state.sparsity.weights[name][grown] != 0).float().mean()
        assert alive > (0.95 if "pwconv" in name else 0), name
    average = dict(state.ema.model.named_parameters())
    for name, grown in new.items():  # the average of a new weight starts at its first value
        torch.testing.assert_close(average[name][grown], state.sparsity.weights[name][grown])


def test_momentum_growth_ranks_masked_weights_by_their_moments():
    """So theirs are kept, unlike with the other kinds of growth, and zeroed on growth."""
    state = sparse_state(start="uniform", growth="momentum", prune_every=2)
    update(state)
    name = "stages.2.0.pwconv1.weight"
    weight, before = state.sparsity.weights[name], state.sparsity.masks[name].clone()
    assert (moments(state, name)[0][~before] != 0).any()
    seen, original = {}, state.sparsity._score

    def score(layer, rng):
        if layer is weight:
            mean, square = moments(state, name)
            seen["score"] = (mean / (square.sqrt() + 1e-8)).abs()
        return original(layer, rng)

    state.sparsity._score = score
    update(state)
    grown = state.sparsity.masks[name] & ~before
    left = ~state.sparsity.masks[name] & ~before
    assert grown.any() and seen["score"][grown].min() >= seen["score"][left].max() > 0
    assert (moments(state, name)[0][grown] == 0).all()
    assert (moments(state, name)[0][left] != 0).any()


def test_just_pruned_weights_come_back_only_where_nothing_else_is_left():
    state = sparse_state(start="", prune_rate=0.5)
    name = "stages.3.0.pwconv1.weight"
    weight = state.sparsity.weights[name]
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask.view(-1)[:100] = False
    state.sparsity._set_masks({name: mask})
    state.sparsity.apply_masks()
    update(state, 2)
    new = state.sparsity.masks[name]
    assert new.sum() == mask.sum() and new.view(-1)[:100].all()
    returned = mask & (weight == 0)  # 100 of those pruned made room, the others came back at zero
    assert returned.sum() == math.ceil(state.sparsity.prune_rate * int(mask.sum()))
    assert (moments(state, name)[0][returned] == 0).all()


def test_static_masks_never_change_and_the_last_update_changes_none():
    for options, expected in (({"prune_every": 0}, 0), ({"prune_every": 2, "total_steps": 4}, 1)):
        state = sparse_state(**options)
        update(state, 4)
        assert state.sparsity.num_changes == expected
    assert "prune_rate" not in sparse_state(prune_every=0).metrics()
    assert sparse_state().metrics() == {"density": pytest.approx(0.6, abs=1e-3),
                                        "prune_rate": 0.3}


def test_gradients_that_overflowed_rank_nothing():
    """The change waits for the next update that has gradients."""
    state = sparse_state(growth="gradient", fp16_scaler=True)
    update(state, amp_dtype=torch.float16)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 40)
    update(state, amp_dtype=torch.float16)
    assert state.step == 2 and state.sparsity.num_changes == 0
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    update(state, amp_dtype=torch.float16)
    assert state.sparsity.num_changes == 1 and state.sparsity.changed_at == 3
    update(state, amp_dtype=torch.float16)
    assert state.sparsity.num_changes == 2  # the next is where it always was


def test_momentum_growth_waits_for_the_first_moments():
    state = sparse_state(growth="momentum", prune_every=1, fp16_scaler=True)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 40)
    update(state, amp_dtype=torch.float16)
    assert state.step == 1 and state.sparsity.num_changes == 0
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    update(state, amp_dtype=torch.float16)
    assert state.sparsity.num_changes == 1


def test_growth_depends_on_seed_and_step_alone():
    masks = []
    for seed in (0, 0, 1):
        state = sparse_state(seed=seed)
        state.sparsity._set_masks({name: torch.arange(weight.numel()).view(weight.shape) % 2 == 0
                                   for name, weight in state.sparsity.weights.items()})
        update(state, 2)
        masks.append(state.sparsity.masks["head.weight"].clone())
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


# What a checkpoint keeps


def test_one_bit_per_weight_goes_there_and_back():
    state = sparse_state()
    update(state, 2)
    saved = state.sparsity.state_dict()
    size = sum(bits.numel() for bits in saved["masks"].values())
    num_weights = sum(mask.numel() for mask in state.sparsity.masks.values())
    assert num_weights / 8 <= size <= num_weights / 8 + len(saved["masks"])
    other = sparse_state(start="")
    other.load_state_dict(state.state_dict())
    assert other.sparsity.masks.keys() == state.sparsity.masks.keys()
    for name, mask in state.sparsity.masks.items():
        assert torch.equal(other.sparsity.masks[name], mask)
        assert other.sparsity.masks[name].stride() == mask.stride()
    assert other.sparsity.density == state.sparsity.density
    assert other.sparsity.metrics() == state.sparsity.metrics()


DAMAGES = {
    "short": lambda masks: masks.update({"head.weight": torch.zeros(3, dtype=torch.uint8)}),
    "no bytes": lambda masks: masks.update({"head.weight": masks["head.weight"].float()}),
    "no tensor": lambda masks: masks.update({"head.weight": 3}),
    "of another network": lambda masks: masks.update({"fc.weight": masks["head.weight"]}),
    "one is missing": lambda masks: masks.pop("head.weight"),
    "all are missing": lambda masks: masks.clear(),
    "inverted": lambda masks: masks.update({name: 255 - bits for name, bits in masks.items()}),
    "one bit": lambda masks: masks["stages.0.0.pwconv1.weight"][:1].bitwise_xor_(1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_masks_are_refused(damage):
    state = sparse_state(start="uniform")
    update(state)
    saved = copy.deepcopy(state.state_dict())
    DAMAGES[damage](saved["sparsity"]["masks"])
    with pytest.raises(ValueError, match="does not fit this network|not those of its weights"):
        sparse_state(start="").load_state_dict(saved)


@pytest.mark.parametrize("growth", ["random", "gradient", "momentum"])
@pytest.mark.parametrize("stop_at", [3, 4])  # 4 is right after a change, new weights still at zero
def test_a_restored_state_goes_on_as_if_never_stopped(growth, stop_at):
    whole, cut = sparse_state(growth=growth), sparse_state(growth=growth)
    update(whole, 7)
    update(cut, stop_at)
    saved = copy.deepcopy(cut.state_dict())
    resumed = sparse_state(start="", growth=growth)
    resumed.load_state_dict(saved)
    update(resumed, 7 - stop_at)
    assert resumed.sparsity.num_changes == whole.sparsity.num_changes == 3
    for name, mask in whole.sparsity.masks.items():
        assert torch.equal(mask, resumed.sparsity.masks[name]), name
    for state in ("distiller", "ema"):
        left, right = (getattr(s, state) for s in (whole, resumed))
        left, right = (getattr(s, "model", s).state_dict() for s in (left, right))
        assert all(torch.equal(value, right[name]) for name, value in left.items())


# The program


SMALL = ["--teacher", "none", "--student", "slak_pico", "dims=16,32", "--data-set", "outlines",
         "train_size=48", "val_size=10", "--input-size", "32", "--batch-size", "8",
         "--effective-batch", "8", "--epochs", "2", "--warmup-steps", "1", "--num-workers", "0",
         "--lr", "1e-2", "--save-freq", "0"]
SPARSE = ["--sparsity", "0.4", "--prune-every", "2"]
NAME = "run"


@pytest.fixture(scope="module")
def sparse_run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sparse")
    words = [*SPARSE, "--model-ema", "--output-dir", str(folder / "run")]
    assert train_kd.main([*SMALL, *words]) == 0
    return folder / NAME


def test_a_sparse_run_ends_sparse_and_says_so(sparse_run):
    saved = load_file(sparse_run / "checkpoint-last.pth")
    masked = saved["sparsity"]["masks"]
    assert masked and saved["sparsity"]["num_changes"] == 5  # of 12 updates, not the last
    model = create_model("slak_pico", 10, dims=(16, 32))
    total = sum(weight.numel() for weight in maskable(model).values())
    for key in ("model", "model_ema"):
        zeros = sum(int((saved[key][name] == 0).sum()) for name in masked)
        assert zeros / total == pytest.approx(0.4, abs=0.005), key
    records = [json.loads(line) for line in (sparse_run / "log.txt").read_text().splitlines()]
    # A weight on a rim of its kernel that the map never meets stays where it grew, at zero.
    assert records[0]["density"] == records[1]["density"] == pytest.approx(1 - zeros / total,
                                                                           abs=1e-3)
    assert records[0]["prune_rate"] > records[1]["prune_rate"] == FINAL_PRUNE_RATE


def refused(capsys, folder, *words: str) -> str:
    capsys.readouterr()
    assert train_kd.main([*SMALL, *words, "--output-dir", str(folder / "run")]) == 2
    return capsys.readouterr().err


def test_resuming_otherwise_is_refused_with_the_reason(sparse_run, tmp_path, capsys):
    file = sparse_run / "checkpoint-last.pth"
    message = refused(capsys, tmp_path, "--model-ema", "--resume", str(file))
    assert "sparsity: 0.4 there, 0.0 here" in message
    message = refused(capsys, tmp_path, *SPARSE, "--model-ema", "--growth", "gradient",
                      "--resume", str(file))
    assert "growth: random there, gradient here" in message
    for content, telling in ((None, "holds no masks"),
                             ({"masks": {}, "num_masked": 1}, "sparsity lacks"),
                             ([1], "does not hold the state"), ({"masks": 3}, "does not hold")):
        saved = {**load_file(file), "sparsity": content}
        (tmp_path / "other").mkdir(exist_ok=True)
        save_atomically(saved, tmp_path / "other" / "damaged.pth")
        message = refused(capsys, tmp_path / "runs", *SPARSE, "--model-ema", "--resume",
                          str(tmp_path / "other" / "damaged.pth"))
        assert telling in message
        assert not (tmp_path / "runs").exists()


def test_zeros_of_a_file_are_kept_with_weights_and_not_masked_anew(sparse_run, tmp_path, capsys):
    file = str(sparse_run / "checkpoint-last.pth")
    message = refused(capsys, tmp_path, "--sparsity", "0.4", "--student-weights", file)
    assert "trained sparse" in message and "--sparse-init weights" in message
    message = refused(capsys, tmp_path, "--sparsity", "0.2", "--sparse-init", "weights",
                      "--student-weights", file)
    assert "40.0% of its weights" in message and "pass --sparsity 0.400" in message
    assert train_kd.main([*SMALL, *SPARSE, "--prune-every", "0", "--sparse-init", "weights",
                          "--student-weights", file, "--output-dir", str(tmp_path / "run")]) == 0
    first = load_file(file)
    again = load_file(tmp_path / NAME / "checkpoint-last.pth")
    assert first["sparsity"]["masks"].keys() == again["sparsity"]["masks"].keys()
    for name, bits in first["sparsity"]["masks"].items():
        same = bits == again["sparsity"]["masks"][name]
        assert (~same).sum() <= 1, name  # bytes; a live weight that stayed zero is not seen


@pytest.mark.parametrize("words, telling", [
    (["--growth", "gradient"], "--growth does nothing without --sparsity"),
    (["--sparsity", "1.2"], "--sparsity must be in [0, 1)"),
    (["--sparsity=-0.5"], "--sparsity must be in [0, 1), got -0.5"),
    (["--sparsity", "0.4", "--sparse-init", "erk_plus"], "erk_plus"),
    (["--sparsity", "0.4", "--prune-every=-1"], "--prune-every must be at least 0"),
    (["--sparsity", "0.4", "--prune-rate", "0"], "--prune-rate must lie in"),
    (["--sparsity", "0.4", "--sparse-init", "weights"], "--student-weights"),
    (["--sparsity", "0.4", "--sparse-layers", "large-kernel", "--student", "resnet_nano"],
     "no large kernels")])
def test_bad_words_stop_before_the_run_folder_exists(words, telling, tmp_path, capsys):
    assert telling in refused(capsys, tmp_path / "runs", *words)
    assert not (tmp_path / "runs").exists()


def test_a_sparse_student_under_a_teacher(tmp_path, monkeypatch):
    """The student is masked, the teacher is not."""
    teachers = []

    def build_frozen(*args, **kwargs):
        teachers.append(FrozenTeacher(*args, **kwargs))
        return teachers[-1]

    monkeypatch.setattr(train_kd, "FrozenTeacher", build_frozen)
    words = ["--teacher", "slak_pico", "--teacher-weights", "random", "--student",
             "convnext_bn_pico", "dims=16,32", "--epochs", "1", *SPARSE]
    assert train_kd.main([*SMALL, *words, "--output-dir", str(tmp_path / "run")]) == 0
    (folder,) = tmp_path.iterdir()
    saved = load_file(folder / "checkpoint-last.pth")
    for name in saved["sparsity"]["masks"]:
        assert (saved["model"][name] == 0).any()
    (teacher,) = teachers
    weights = [weight for weight in teacher.parameters() if weight.dim() > 1]
    assert weights and not any((weight == 0).float().mean() > 0.01 for weight in weights)
