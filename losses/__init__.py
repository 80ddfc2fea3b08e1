"""One file per loss, each readable beside its paper. A new one is a file here and its import."""
from losses import ce, dist, dkd, fd, kd, mgd, nkd  # noqa: F401  (importing registers them)
from losses.base import Loss, create_loss, create_losses, list_losses

__all__ = ["Loss", "create_loss", "create_losses", "list_losses"]
