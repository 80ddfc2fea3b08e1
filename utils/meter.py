"""Means of what happens during an epoch, over all processes."""
import math

import torch
from torch import Tensor

from utils.distributed import gather_objects, sum_over_ranks, world_size


class Meter:
    """Means of scalars over an epoch, their sums kept on the device until asked for."""

    def __init__(self) -> None:
        # float64: a resume must not change an epoch's mean.
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.failed_at: dict[str, Tensor] = {}  # first update with a NaN or infinity, else inf

    def add(self, values: dict[str, Tensor], step: int, *, may_be_missing: bool = False) -> None:
        """Count a value each, unless it is not finite: then its step is remembered, as that of a
        failure, or, where it may be missing, nothing is."""
        for name, value in values.items():
            value = value.detach().double()
            is_good = value.isfinite()
            self.sums[name] = self.sums.get(name, 0) + torch.where(is_good, value, 0)
            self.counts[name] = self.counts.get(name, 0) + is_good.double()
            if not may_be_missing:
                failed_at = torch.where(is_good, math.inf, float(step))
                self.failed_at[name] = torch.minimum(self.failed_at.get(name, failed_at), failed_at)

    def failures(self) -> list[tuple[float, str]]:
        """First step and name of whatever was not finite, on any process, the earliest first."""
        local = [(step.item(), name) for name, step in self.failed_at.items()
                 if math.isfinite(step.item())]
        if not sum_over_ranks(torch.tensor([float(len(local))])).item():
            return []
        everywhere = [failure for share in gather_objects(local) for failure in share]
        return sorted(everywhere, key=lambda failure: failure[0])  # stable: terms before the total

    def means(self) -> dict[str, float]:
        """Averages of the finite values of the epoch so far and all processes; NaN where there
        were none. Waits for the device."""
        sums, counts = self._global(self.sums), self._global(self.counts)
        return {name: sums[name] / counts[name] if counts[name] else math.nan for name in sums}

    def _global(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Averaged over the processes; called by all of them."""
        if not values:
            return {}
        stacked = torch.stack([value.cpu() for value in values.values()])
        return dict(zip(values, (sum_over_ranks(stacked) / world_size()).tolist()))

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"sums": self._global(self.sums), "counts": self._global(self.counts)}

    def load_state_dict(self, state: dict[str, dict[str, float]], device: torch.device) -> None:
        for name in ("sums", "counts"):
            setattr(self, name, {key: torch.tensor(value, dtype=torch.float64, device=device)
                                 for key, value in state[name].items()})
