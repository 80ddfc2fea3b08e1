"""What an update is made of: its batch, parameter groups, the optimizer, schedules, the average."""
import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from utils.registry import UserError


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


def build_adamw(groups: list[dict], *, lr: float, betas: tuple[float, float],
                eps: float) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, by PyTorch's fused kernel: one pass over each parameter."""
    fields = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    return torch.optim.AdamW(fields, lr=lr, betas=betas, eps=eps, fused=True)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a saved state into AdamW of `build_adamw`. Each moment gets the layout in memory of its
    parameter, which may have changed since: the fused kernel reads both as they lie."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["fused"] = True
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
