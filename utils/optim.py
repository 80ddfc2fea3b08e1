"""What an update is made of: its batch, parameter groups, the optimizer, schedules, the average."""
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils.content import entry
from utils.registry import UserError, short

LEAST_UPDATES = 10  # per epoch, where nobody chose the size of a batch


def fit_batch(train_size: int, batch_size: int, world_size: int, effective: int, *,
              is_fixed: bool) -> tuple[int, int]:
    """Images per process, and per update over all: these defaults, or what a data set so small that
    they leave it fewer than LEAST_UPDATES updates per epoch allows. `is_fixed`: the first is no
    default."""
    if train_size >= LEAST_UPDATES * effective:
        return batch_size, effective
    while not is_fixed and batch_size > 2 and batch_size * world_size > train_size:
        batch_size //= 2
    per_micro_step = batch_size * world_size
    num_micro_steps = max(train_size // LEAST_UPDATES // per_micro_step, 1)
    return batch_size, min(effective, per_micro_step * num_micro_steps)


def resolve_sizes(values: Mapping[str, Any], given: Sequence[str], chosen: Sequence[str]
                  ) -> dict[str, int]:
    """What the flags of batch and warm-up come to, by name, given the `values` of all flags, and
    the data's size and the number of processes. `given`: on the command line; `chosen`: there or in
    a recipe. Raises UserError where the numbers do not go together."""
    # images per update = processes x images per process x micro-batches
    train_size, batch_size = values["train_size"], values["batch_size"]
    world_size, effective = values["world_size"], values["effective_batch"]
    if not {"effective_batch", "accum_steps"} & {*chosen}:
        batch_size, effective = fit_batch(train_size, batch_size, world_size, effective,
                                          is_fixed="batch_size" in chosen)
    asked = effective if "effective_batch" in given else None
    accum_steps = values["accum_steps"]
    if asked is not None and "accum_steps" not in given:
        accum_steps = None  # a recipe's; the command line wins
    accum_steps, effective = resolve_batch(batch_size, world_size, accum_steps, asked,
                                           default=effective)
    steps_per_epoch, warmup_steps = updates_per_epoch(train_size, effective), values["warmup_steps"]
    if warmup_steps is None:
        warmup_steps = warmup_updates(values["warmup_epochs"], steps_per_epoch, values["epochs"],
                                      is_fixed="warmup_epochs" in chosen)
    return {"batch_size": batch_size, "effective_batch": effective, "accum_steps": accum_steps,
            "steps_per_epoch": steps_per_epoch, "warmup_steps": warmup_steps}


def resolve_batch(batch_size: int, world_size: int, accum_steps: int | None, effective: int | None,
                 *, default: int) -> tuple[int, int]:
    """Micro-batches per update, and images per update over all processes.

    What the user set of `accum_steps` and `effective` holds (None: not set); with neither,
    `default` images. Raises UserError where the numbers do not go together.
    """
    per_micro_step = batch_size * world_size
    product = f"{world_size} process(es) x {batch_size} images"
    if accum_steps is not None:
        total = per_micro_step * accum_steps
        if effective not in (None, total):
            raise UserError(f"--effective-batch {effective} contradicts {product} x --accum-steps "
                            f"{accum_steps} = {total}. Leave one of them out.")
        return accum_steps, total
    wanted = default if effective is None else effective
    accum_steps, rest = divmod(wanted, per_micro_step)
    if rest or not accum_steps:
        raise UserError(f"--effective-batch {wanted} is not a multiple of {product} = "
                        f"{per_micro_step}. Change --batch-size or --effective-batch, or set "
                        "--accum-steps.")
    return accum_steps, wanted


def updates_per_epoch(train_size: int, effective: int) -> int:
    """Raises UserError where there are none."""
    if train_size < effective:
        raise UserError(f"the training set has {train_size} images, fewer than one effective "
                        f"batch of {effective}. Lower --effective-batch (and --batch-size).")
    return train_size // effective


def warmup_updates(warmup_epochs: float, steps_per_epoch: int, epochs: int, *,
                   is_fixed: bool) -> int:
    """Updates of a warm-up of so many epochs. Where they are a default (not `is_fixed`) and as long
    as the run, a tenth of the run."""
    if warmup_epochs * steps_per_epoch >= 2 ** 31:  # or infinite
        raise UserError(f"--warmup-epochs {warmup_epochs:g} is longer than the run of {epochs} "
                        "epochs. Lower it.")
    number, total = int(warmup_epochs * steps_per_epoch), epochs * steps_per_epoch
    return number if is_fixed or number < total else total // 10


def describe_schedule(values: Mapping[str, Any], defaults: Mapping[str, Any],
                      chosen: Sequence[str]) -> list[str]:
    """The arithmetic of batch, updates and rate in sentences, and one for each default that shrank
    to the data: of flags by name their `values` in this run, their defaults, and which the user
    chose."""
    steps, epochs = values["steps_per_epoch"], values["epochs"]
    sentences = [
        f"effective batch {values['effective_batch']} = {values['world_size']} process(es) x "
        f"{values['batch_size']} images x {values['accum_steps']} accumulated",
        f"{values['train_size']:,} images // {values['effective_batch']} = {steps} updates per "
        f"epoch, {epochs * steps:,} in {epochs} epochs",
        f"learning rate 0 -> {values['lr']:g} in {values['warmup_steps']:,} updates, then cosine "
        f"to {values['min_lr']:g}"]
    default, effective = defaults["effective_batch"], values["effective_batch"]
    if effective < default and not {"effective_batch", "accum_steps"} & {*chosen}:
        lr = "" if "lr" in chosen else f"; --lr {values['lr']:g} was chosen for {default}"
        sentences.append(f"effective batch {effective} instead of the default {default}, to leave "
                         f"{values['train_size']:,} images {LEAST_UPDATES} updates per epoch or as "
                         f"many as --batch-size allows{lr}")
    wanted = int(values["warmup_epochs"] * values["steps_per_epoch"])
    if values["warmup_steps"] < wanted and not {"warmup_steps", "warmup_epochs"} & {*chosen}:
        sentences.append(f"warm-up of a tenth of the run instead of the default "
                         f"{values['warmup_epochs']:g} epochs, which are as long as the run")
    return sentences


def parameter_groups(model: nn.Module, weight_decay: float,
                     layer_decay: float = 1.0) -> list[dict]:
    """Groups with `weight_decay`, `decays`, `lr_scale`, `names` and `params`, in order of first
    appearance.

    No decay for 1-D parameters, names ending in .bias and what `model.no_weight_decay()` names.
    With `layer_decay` below 1 the rate of a parameter is scaled by layer_decay ** (last - id), its
    id from `model.layer_ids()`.
    """
    if not 0 < layer_decay <= 1:
        raise UserError(f"--layer-decay must lie in (0, 1], got {layer_decay}.")
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    ids = model.layer_ids() if layer_decay < 1 else {}
    last = max(ids.values(), default=0)
    groups: dict[tuple[bool, int], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_exempt = parameter.dim() <= 1 or name.endswith(".bias") or name in exempt
        depth = ids.get(name, last)
        group = groups.setdefault((is_exempt, depth), {
            "weight_decay": 0.0 if is_exempt else weight_decay, "decays": not is_exempt,
            "lr_scale": layer_decay ** (last - depth), "names": [], "params": []})
        group["names"].append(name)
        group["params"].append(parameter)
    return list(groups.values())


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, arXiv 1904.00962, algorithm 2): Adam's step for every tensor, decay
    included, scaled to the length of the tensor,

        u = m / (sqrt(v) + eps) + weight_decay * w,    w <- w - lr * |w| / |u| * u,

    m and v with Adam's bias correction. As in timm's, which published recipes were trained with, a
    tensor that does not decay is not scaled either, nor one whose |w| or |u| is 0. That one also
    limits the norm of the gradient to 1, which here is --clip-grad 1.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float],
                 eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0,
                                  "decays": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            grads, states = [weight.grad for weight in weights], [self.state[w] for w in weights]
            for weight, state in zip(weights, states):
                if not state:
                    state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight),
                              "exp_avg_sq": torch.zeros_like(weight)}
                state["step"] += 1
            means, squares = [[state[name] for state in states]
                              for name in ("exp_avg", "exp_avg_sq")]
            beta1, beta2 = group["betas"]
            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            steps = [state["step"].item() for state in states]  # on the CPU
            updates = torch._foreach_div(means, [1 - beta1 ** step for step in steps])
            roots = torch._foreach_div(torch._foreach_sqrt(squares),
                                       [math.sqrt(1 - beta2 ** step) for step in steps])
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_div_(updates, roots)
            if group["decays"]:
                torch._foreach_add_(updates, torch._foreach_mul(weights, group["weight_decay"]))
                for update, length, own in zip(updates, torch._foreach_norm(weights),
                                               torch._foreach_norm(updates)):
                    has_both = (length > 0) & (own > 0)
                    update.mul_(torch.where(has_both, length / own, 1.0))
            torch._foreach_add_(weights, updates, alpha=-group["lr"])


OPTIMIZERS = ("adamw", "sgd", "lamb")


def build_optimizer(name: str, groups: list[dict], *, lr: float,
                    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                    momentum: float = 0.9, nesterov: bool = True) -> torch.optim.Optimizer:
    """One of OPTIMIZERS over `parameter_groups`; PyTorch's own by its fused kernel, one pass over
    each parameter. `betas` and `eps` are AdamW's and LAMB's, `momentum` and `nesterov` SGD's, whose
    decay is a part of the gradient (L2) as everywhere."""
    fields = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    if name == "adamw":
        return torch.optim.AdamW(fields, lr=lr, betas=betas, eps=eps, fused=True)
    if name == "lamb":
        return Lamb(fields, lr, betas, eps)
    return torch.optim.SGD(fields, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0,
                           fused=True)


SCHEDULED = ("lr", "weight_decay")  # of a group; set anew at every update
CONSTANT = ("params", "decays", "lr_scale", "betas", "eps", "momentum", "nesterov")  # if it has it


def optimizer_form(optimizer: torch.optim.Optimizer, saved: Any, is_whole: bool) -> dict:
    """What a state saved of `optimizer` looks like, for `check_form`: the moments of each parameter
    that `saved` has, or, unless `is_whole` is known, of every one. (One that never had a gradient
    has none.)

    Raises ValueError unless `saved` has the same groups: the same parameters in each, and the same
    constants. What other versions of PyTorch add to a group or lack does not count."""
    own = optimizer.state_dict()["param_groups"]
    groups, states = entry(saved, "param_groups"), entry(saved, "state")
    if not isinstance(groups, list) or len(groups) != len(own):
        raise ValueError(f"optimizer.param_groups is not a list of {len(own)} groups")
    for i, (group, wanted) in enumerate(zip(groups, own)):
        for name in (*SCHEDULED, *(name for name in CONSTANT if name in wanted)):
            value = group.get(name) if isinstance(group, dict) else None
            is_rate = isinstance(value, float) and 0 <= value < math.inf
            is_equal = type(value) is type(wanted[name]) and value == wanted[name]
            if not (is_rate if name in SCHEDULED else is_equal):
                raise ValueError(f"optimizer.param_groups[{i}].{name} is {short(value)}, expected "
                                 f"{'a rate' if name in SCHEDULED else short(wanted[name])}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [i for i in range(len(parameters))
               if not is_whole or not isinstance(states, dict) or i in states]
    return {"param_groups": list,
            "state": {i: _moments(own[0], parameters[i]) for i in indices}}


def _moments(group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """What an optimizer with such a group keeps of a parameter."""
    if "betas" in group:
        return {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
    return {"momentum_buffer": parameter} if group["momentum"] else {}


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a saved state into an optimizer of `build_optimizer`. Each moment gets the layout in
    memory of its parameter, which may have changed since: a fused kernel reads both as they lie."""
    groups = [{**own, **{name: group[name] for name in SCHEDULED}} for own, group in
              zip(optimizer.state_dict()["param_groups"], state["param_groups"])]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)


def cosine_schedule(base: float, final: float, total_steps: int,
                    warmup_steps: int = 0) -> Callable[[int], float]:
    """step -> value: linear from exactly 0 to `base` over the warm-up, both ends included, then
    half a cosine towards `final`, reached one step after the last (the published schedule)."""
    if not 0 <= warmup_steps <= total_steps:
        raise UserError(f"the warm-up of {warmup_steps} updates is longer than the run of "
                        f"{total_steps}; lower --warmup-epochs or --warmup-steps.")

    def value(step: int) -> float:
        if step < warmup_steps:
            return base * step / max(warmup_steps - 1, 1)
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))

    return value


def build_schedule(total_steps: int, warmup_steps: int, *, lr: float, min_lr: float,
                   weight_decay: float, weight_decay_end: float | None
                   ) -> Callable[[int], dict[str, float]]:
    """step -> the recipe's `lr` and `weight_decay` (constant without `weight_decay_end`)."""
    lr_at = cosine_schedule(lr, min_lr, total_steps, warmup_steps)
    end = weight_decay if weight_decay_end is None else weight_decay_end
    weight_decay_at = cosine_schedule(weight_decay, end, total_steps)
    return lambda step: {"lr": lr_at(step), "weight_decay": weight_decay_at(step)}


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Apply the schedules' values: every group its scaled rate, and `weight_decay` where the group
    decays at all."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decays"]:
            group["weight_decay"] = weight_decay


class ModelEma:
    """A copy of `model` whose every floating tensor, buffers too, follows
    ema = decay * ema + (1 - decay) * value; integer buffers are copied.

    With `warmup` the decay is min(decay, (1 + n) / (10 + n)) at update n (TensorFlow's rule), so
    that a short run's average is not mostly its random start.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: bool = False) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup = decay, warmup
        self.num_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        """Follow `model`. Under `masks`, bool by name of the parameter, the average is zero where
        they are False, and the value itself where it was zero until now (as published)."""
        n = self.num_updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        averages, values = [], []
        source = model.state_dict()
        for name, average in self.model.state_dict().items():
            if not average.is_floating_point():
                average.copy_(source[name])
            elif masks and name in masks:
                _update_masked(average, source[name], masks[name], decay)
            else:
                averages.append(average)
                values.append(source[name])
        if averages:
            torch._foreach_lerp_(averages, values, 1 - decay)
        self.num_updates += 1


def _update_masked(average: Tensor, value: Tensor, mask: Tensor, decay: float) -> None:
    # Products with bytes take half the time of torch.where.
    new = value * (average == 0).view(torch.uint8)
    average.lerp_(value, 1 - decay).add_(new, alpha=decay).mul_(mask.view(torch.uint8))
