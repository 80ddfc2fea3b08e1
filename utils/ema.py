"""Exponential moving average of a model's weights."""
import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


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
