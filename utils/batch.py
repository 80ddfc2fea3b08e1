"""How many images make an update."""
from utils.errors import UserError


def settle_batch(batch_size: int, world_size: int, accum_steps: int | None, effective: int | None,
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
