"""Large depthwise convolutions: one operator, several exact backends, a file each."""
from torch import nn


def use(backend: str, *networks: nn.Module | None) -> None:
    """`operator.set_backend`, by the name that programs written for older versions import."""
    from models.large_kernel.operator import set_backend  # needs this package to be there

    set_backend(backend, *networks)
