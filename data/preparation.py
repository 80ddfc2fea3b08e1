"""From the loader's bytes to the network's floats: the batch, and what is done to it on the device,
in training and evaluation alike."""
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import default_collate

from data.erasing import Erasure, erase_
from utils.errors import UserError

Sample = tuple[Tensor, Erasure | None, int, int]  # image (3, H, W) uint8, erasure, label, index


@dataclass
class Pictures:
    """A batch of pictures as bytes, and where they are to be erased."""

    pixels: Tensor  # (N, 3, H, W) uint8, channels-last in memory
    erased: Tensor  # (K, 6) int64: place in the batch, then Erasure's fields
    num_erased: int = 0  # pixels in all rectangles together

    @classmethod
    def blank(cls, number: int, input_size: int) -> "Pictures":
        """Black ones, nothing erased."""
        return cls(torch.zeros(number, 3, input_size, input_size, dtype=torch.uint8),
                   torch.zeros(0, 6, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device, *, non_blocking: bool = False,
           memory_format: torch.memory_format = torch.preserve_format) -> "Pictures":
        # Copied as they lie, so that pinned memory goes without waiting; reordered there.
        pixels = self.pixels.to(device, non_blocking=non_blocking)
        if memory_format is not torch.preserve_format:
            pixels = pixels.contiguous(memory_format=memory_format)
        return replace(self, pixels=pixels,
                       erased=self.erased.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Pictures":  # torch's loader asks for it by this name
        return replace(self, pixels=self.pixels.pin_memory(), erased=self.erased.pin_memory())


def collate(samples: Sequence[Sample]) -> tuple[Pictures, Tensor, Tensor]:
    """(pictures, labels (N,), indices (N,))."""
    images, erasures, labels, indices = zip(*samples)
    # Stacked as they lie in memory, (H, W, 3): one copy, in a worker straight into shared memory.
    pixels = default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    erased = [(place, *erasure) for place, erasure in enumerate(erasures) if erasure is not None]
    rows = torch.tensor(erased, dtype=torch.int64).view(-1, 6)
    num_erased = sum(erasure.height * erasure.width for erasure in erasures if erasure is not None)
    return Pictures(pixels, rows, num_erased), torch.tensor(labels), torch.tensor(indices)


class Preparation:
    """Pictures -> float32 (N, 3, H, W), normalised, then erased, all on their device.

    `mean` and `std` are of pixels in 0..1. Normalising is one multiplication and one addition:
    within 1e-6 of torchvision's ToTensor and Normalize.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float],
                 device: torch.device | str = "cpu") -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UserError(f"mean is {tuple(mean)} and std is {tuple(std)}; both need three "
                            "numbers (red, green, blue), those of std above 0.")
        means, stds = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
                       for values in (mean, std))
        self.scale, self.shift = (value.float().to(device)
                                  for value in (1 / (255 * stds), -means / stds))

    def __call__(self, pictures: Pictures) -> Tensor:
        images = pictures.pixels.float()
        torch.addcmul(self.shift, images, self.scale, out=images)
        if len(pictures.erased):
            # After normalisation, so that N(0, 1) noise has the statistics of what is around it.
            erase_(images, pictures.erased, pictures.num_erased)
        return images
