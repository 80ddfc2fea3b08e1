"""models/fused/batch_norm.py against nn.BatchNorm2d and its gradients in float64.

Triton's interpreter must be chosen before Triton is imported, so the comparisons run in a process
of their own: this file, as a script.
"""
import copy
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import nn

from models.fused import batch_norm
from models.fused.batch_norm import can_fuse, sum_of_batch_norms
from tests.kernels import SUCCESS, needs_triton, run_script, tell

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the maximum
FIRST, LAST = torch.contiguous_format, torch.channels_last
# maps, shape, their layout, that of the gradient
CASES = [
    (3, (2, 5, 28, 20), FIRST, LAST),  # several chunks of several tiles
    (3, (5, 70, 7, 7), FIRST, LAST),  # more channels than a tile
    (2, (5, 6, 14, 13), LAST, LAST),
    (3, (3, 9, 5, 1), LAST, FIRST),
    (1, (3, 2, 28, 28), FIRST, FIRST),
    (2, (2, 4, 1, 1), FIRST, LAST),
]


def plain(maps, norms):
    return sum(norm(x) for x, norm in zip(maps, norms))


def make_norms(number: int, channels: int) -> list[nn.Module]:
    norms = [nn.BatchNorm2d(channels, momentum=0.3) for _ in range(number)]
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norms


def make_maps(number: int, shape: tuple[int, ...], layout: torch.memory_format = FIRST,
              dtype: torch.dtype = torch.float32, mean: float = 1.0) -> list[torch.Tensor]:
    return [(torch.randn(shape) * (1 + i) + i * mean).to(dtype).contiguous(memory_format=layout)
            for i in range(number)]


def results(call, maps, norms, gradient) -> dict[str, torch.Tensor]:
    """The sum, all gradients and all running statistics after one step of copies."""
    maps, norms = [x.detach().clone().requires_grad_() for x in maps], copy.deepcopy(norms)
    out = call(maps, norms)
    out.backward(gradient)
    found = {"sum": out.detach()}
    for i, (x, norm) in enumerate(zip(maps, norms)):
        found |= {f"{name} {i}": value for name, value in norm.state_dict().items()}
        found |= {f"gradient of {name} {i}": value.grad for name, value in norm.named_parameters()}
        found[f"gradient of map {i}"] = x.grad
    return found


def differences(found, expected, tolerance: float) -> list[str]:
    """NaN, which no tolerance admits, where something was left unwritten."""
    wrong = []
    for name, value in expected.items():
        error = (found[name].double() - value).abs().max() / value.abs().max().clamp(min=1e-3)
        if not error <= tolerance:
            wrong.append(f"{name}: error {error:.1e}")
    return wrong


def compare(case, dtype: torch.dtype, mean: float = 1.0) -> list[str]:
    number, shape, layout, gradient_layout = case
    maps, norms = make_maps(number, shape, layout, dtype, mean), make_norms(number, shape[1])
    gradient = torch.randn(shape).to(dtype).contiguous(memory_format=gradient_layout)
    assert can_fuse(maps, norms)
    expected = results(plain, [x.double() for x in maps], [n.double() for n in
                                                           copy.deepcopy(norms)], gradient.double())
    found = results(sum_of_batch_norms, maps, norms, gradient)
    wrong = differences(found, expected, TOLERANCES[dtype])
    if found["sum"].dtype != dtype or not found["sum"].is_contiguous(memory_format=LAST):
        wrong.append(f"a sum in {found['sum'].dtype} with strides {found['sum'].stride()}")
    if any(found[f"gradient of map {i}"].stride() != x.stride() for i, x in enumerate(maps)):
        wrong.append("a gradient in another layout than its map")
    return [f"{case} in {dtype}: {line}" for line in wrong]


def compiled_failures() -> list[str]:
    """One graph, the running statistics in it, and maps of two layouts."""
    maps, norms = make_maps(2, (2, 3, 5, 4)), make_norms(2, 3)
    maps[1] = maps[1].contiguous(memory_format=LAST)
    gradient = torch.randn(2, 3, 5, 4)
    step = torch.compile(sum_of_batch_norms, fullgraph=True, backend="aot_eager")
    expected = results(plain, [x.double() for x in maps],
                       [norm.double() for norm in copy.deepcopy(norms)], gradient.double())
    return differences(results(step, maps, norms, gradient), expected, 1e-5)


def padded_failures() -> list[str]:
    """Channels of zeros behind those that have weights: zeros come out and go back."""
    norms = make_norms(2, 5)
    maps = [x.index_fill(1, torch.arange(5, 8), 0) for x in make_maps(2, (3, 8, 5, 4))]
    gradient = torch.randn(3, 8, 5, 4)
    expected = results(plain, [x[:, :5].double() for x in maps],
                       [norm.double() for norm in copy.deepcopy(norms)], gradient[:, :5].double())
    found = results(sum_of_batch_norms, maps, norms, gradient)
    wrong = []
    for name in ("sum", "gradient of map 0", "gradient of map 1"):
        if found[name][:, 5:].any():
            wrong.append(f"{name}: not zero behind its channels")
        found[name] = found[name][:, :5]
    return wrong + differences(found, expected, 1e-5)


def separate_biases_failures() -> list[str]:
    """Equal gradients must not share memory: clipping would scale them several times."""
    norms = make_norms(3, 4)
    sum_of_batch_norms(make_maps(3, (2, 4, 3, 3)), norms).sum().backward()
    places = {norm.bias.grad.data_ptr() for norm in norms}
    return [] if len(places) == 3 else ["gradients of biases share memory"]


def failures() -> list[str]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what empty returns with NaN
    batch_norm.PROGRAMS = 4
    found = [line for i, case in enumerate(CASES)
             for line in compare(case, list(TOLERANCES)[i % 3])]
    for case in CASES[:3]:
        found += compare(case, torch.float32)
    TOLERANCES[torch.float32] = 1e-3  # of what 24 bits leave of a mean 1000 times the deviation
    found += compare(CASES[0], torch.float32, mean=1000.0)
    return found + compiled_failures() + padded_failures() + separate_biases_failures()


# Two processes


def process_failures(rank: int, port: str) -> list[str]:
    """nn.SyncBatchNorm's sums, from batches of two sizes, against one process that has them all."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    maps, norms = make_maps(2, (5, 3, 4, 3)), make_norms(2, 3)
    gradient = torch.randn(5, 3, 4, 3)
    expected = results(plain, [x.double() for x in maps],
                       [norm.double() for norm in copy.deepcopy(norms)], gradient.double())
    synced = [nn.SyncBatchNorm.convert_sync_batchnorm(norm) for norm in norms]
    mine = slice(0, 2) if rank == 0 else slice(2, 5)
    assert can_fuse(maps, synced)
    found = results(sum_of_batch_norms, [x[mine] for x in maps], synced, gradient[mine])
    for name, value in found.items():
        if name.startswith(("gradient of weight", "gradient of bias")):
            dist.all_reduce(value)  # DDP's part
        if name == "sum" or "map" in name:
            expected[name] = expected[name][mine]
    return differences(found, expected, 1e-5)


@needs_triton
def test_interpreted_kernels_equal_the_modules():
    printed = run_script(__file__, TRITON_INTERPRET="1")
    assert SUCCESS in printed, printed


@needs_triton
def test_two_processes_share_their_sums():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with ThreadPoolExecutor() as threads:
        for printed in threads.map(
                lambda rank: run_script(__file__, rank, port, TRITON_INTERPRET="1"), "01"):
            assert SUCCESS in printed, printed


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_without_kernels_the_modules_are_called(training, layout):
    maps, norms = make_maps(3, (4, 6, 5, 5), layout), make_norms(3, 6)
    norms[1] = nn.Identity()
    for norm in norms:
        norm.train(training)
    twins = copy.deepcopy(norms)
    assert torch.equal(sum_of_batch_norms(maps, norms), plain(maps, twins))
    for norm, twin in zip(norms, twins):
        for name, value in norm.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name])


def test_what_the_kernels_do_not_compute_is_noticed(monkeypatch):
    monkeypatch.setattr(batch_norm, "has_kernels", lambda device: True)
    maps = make_maps(2, (2, 4, 3, 3))
    assert can_fuse(maps, make_norms(2, 4)) and can_fuse(
        maps, [nn.SyncBatchNorm(4), nn.SyncBatchNorm(4)])
    for options in (dict(affine=False), dict(track_running_stats=False), dict(momentum=None),
                    dict(eps=1e-3)):
        assert not can_fuse(maps, [nn.BatchNorm2d(4), nn.BatchNorm2d(4, **options)])
    for other in (nn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4).bfloat16(), nn.Identity(),
                  nn.SyncBatchNorm(4)):
        assert not can_fuse(maps, [nn.BatchNorm2d(4), other])
        assert not can_fuse(maps, [other, nn.BatchNorm2d(4)])
    for wrong in ([x.double() for x in maps], [x[:1, :, :1, :1] for x in maps],
                  [maps[0], maps[1][:1]], [maps[0], maps[1].bfloat16()]):
        assert not can_fuse(wrong, make_norms(2, 4))
    assert not can_fuse(maps * 2, make_norms(4, 4))
    assert not can_fuse(maps, make_norms(2, 5)) and can_fuse(maps, make_norms(2, 3))
    assert not can_fuse(maps, [nn.BatchNorm2d(3), nn.BatchNorm2d(4)])


if __name__ == "__main__":
    tell(process_failures(int(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 1 else failures())
