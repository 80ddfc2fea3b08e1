"""Large depthwise convolutions: one operator, several exact backends, a file each."""
from models.large_kernel.operator import (
    CHOICES,
    LargeKernelModule,
    Prepared,
    depthwise,
    depthwise_sum,
    describe_choice,
    use,
)

__all__ = ["CHOICES", "LargeKernelModule", "Prepared", "depthwise", "depthwise_sum",
           "describe_choice", "use"]
