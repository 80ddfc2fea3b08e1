"""Exponential moving average of a model's weights."""
import copy

import torch
from torch import nn


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
    def update(self, model: nn.Module) -> None:
        n = self.num_updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        averages, values = [], []
        source = model.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(source[name])
            else:
                average.copy_(source[name])
        torch._foreach_mul_(averages, decay)
        torch._foreach_add_(averages, values, alpha=1 - decay)
        self.num_updates += 1
