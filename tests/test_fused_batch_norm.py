"""models/fused/batch_norm.py against nn.BatchNorm2d and its gradients in float64, also as ResNets
call it.

Triton's interpreter must be chosen before Triton is imported, so the comparisons run in a process
of their own: this file, as a script.
"""
import copy
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from models import resnet, slak
from models.fused import batch_norm
from models.fused.batch_norm import can_fuse, sum_of_batch_norms
from models.layers import set_launches_free
from models.resnet import ResNet
from tests.kernels import (
    SUCCESS,
    check_comparisons,
    needs_triton,
    on_both,
    run_script,
    tell,
    traced,
)

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the maximum
FIRST, LAST = torch.contiguous_format, torch.channels_last
# maps, shape, their layout, that of the gradient, whether there is a shortcut and a ReLU
CASES = [
    (3, (2, 3, 14, 10), FIRST, LAST, False, False),  # several programs of several tiles
    (3, (3, 6, 14, 7), LAST, LAST, False, False),
    (3, (3, 9, 5, 1), LAST, FIRST, False, False),
    (1, (3, 2, 14, 10), FIRST, FIRST, False, True),
    (2, (2, 4, 1, 1), FIRST, LAST, False, False),
    (1, (2, 72, 5, 5), LAST, LAST, False, True),
    (1, (3, 6, 14, 7), LAST, LAST, True, True),
    (2, (3, 16, 10, 9), LAST, LAST, False, True),
    (1, (2, 70, 5, 5), LAST, LAST, True, True),
    (2, (3, 9, 5, 3), LAST, FIRST, True, True),
    (1, (3, 4, 6, 5), LAST, LAST, True, False),
    (3, (2, 10, 5, 5), FIRST, LAST, False, False),  # more channels than a tile
]
ON_A_GPU = [(3, (2, 70, 28, 20), FIRST, LAST, False, False),
            (1, (3, 2, 28, 28), FIRST, FIRST, False, True),
            (1, (32, 64, 56, 57), LAST, LAST, False, True),
            (1, (40, 512, 14, 14), LAST, LAST, True, True),
            (2, (40, 200, 15, 14), LAST, LAST, False, True),
            (3, (40, 504, 14, 14), LAST, LAST, False, False)]


def plain(maps, norms, *, shortcut=None, relu=False):
    out = sum(norm(x) for x, norm in zip(maps, norms))
    out = out if shortcut is None else out + shortcut
    return out.relu() if relu else out


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


def results(call, maps, norms, gradient, shortcut=None, relu=False) -> dict[str, torch.Tensor]:
    """The sum, all gradients and all running statistics after one step of copies."""
    maps, norms = [x.detach().clone().requires_grad_() for x in maps], copy.deepcopy(norms)
    shortcut = None if shortcut is None else shortcut.detach().clone().requires_grad_()
    out = call(maps, norms, shortcut=shortcut, relu=relu)
    out.backward(gradient)
    found = {"sum": out.detach()}
    if shortcut is not None:
        found["gradient of shortcut"] = shortcut.grad
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


def in_double(maps, norms, gradient, shortcut=None, relu=False) -> dict[str, torch.Tensor]:
    return results(plain, [x.double() for x in maps], [n.double() for n in copy.deepcopy(norms)],
                   gradient.double(), None if shortcut is None else shortcut.double(), relu)


def compare(case, dtype: torch.dtype, mean: float = 1.0, device: str = "cpu") -> list[str]:
    number, shape, layout, gradient_layout, has_shortcut, relu = case
    maps = [x.to(device) for x in make_maps(number, shape, layout, dtype, mean)]
    norms = [norm.to(device) for norm in make_norms(number, shape[1])]
    gradient = torch.randn(shape).to(dtype).contiguous(memory_format=gradient_layout).to(device)
    shortcut = torch.randn(shape).to(device, dtype) if has_shortcut else None
    assert can_fuse(maps, norms, shortcut)
    expected = in_double(maps, norms, gradient, shortcut, relu)
    found = results(sum_of_batch_norms, maps, norms, gradient, shortcut, relu)
    wrong = differences(found, expected, TOLERANCES[dtype])
    if found["sum"].dtype != dtype or not found["sum"].is_contiguous(memory_format=LAST):
        wrong.append(f"a sum in {found['sum'].dtype} with strides {found['sum'].stride()}")
    if any(found[f"gradient of map {i}"].stride() != x.stride() for i, x in enumerate(maps)):
        wrong.append("a gradient in another layout than its map")
    return [f"{case} in {dtype}: {line}" for line in wrong]


def compiled_failures() -> list[str]:
    """One graph, the running statistics in it, and maps of two layouts."""
    wrong = []
    for number, has_shortcut, relu in ((2, False, False), (1, False, True), (1, True, True)):
        maps, norms = make_maps(number, (2, 3, 5, 4)), make_norms(number, 3)
        maps[-1] = maps[-1].contiguous(memory_format=LAST)
        shortcut = torch.randn(2, 3, 5, 4) if has_shortcut else None
        gradient = torch.randn(2, 3, 5, 4)
        step = torch.compile(sum_of_batch_norms, fullgraph=True, backend="aot_eager")
        wrong += differences(results(step, maps, norms, gradient, shortcut, relu),
                             in_double(maps, norms, gradient, shortcut, relu), 1e-5)
    return wrong


def padded_failures() -> list[str]:
    """Channels of zeros behind those that have weights: zeros come out and go back."""
    wrong = []
    for number, has_shortcut, relu in ((2, False, False), (1, False, True), (1, True, True)):
        norms, behind = make_norms(number, 5), torch.arange(5, 8)
        maps = [x.index_fill(1, behind, 0) for x in make_maps(number, (3, 8, 5, 4), LAST)]
        shortcut = torch.randn(3, 8, 5, 4).index_fill(1, behind, 0) if has_shortcut else None
        gradient = torch.randn(3, 8, 5, 4)
        expected = in_double([x[:, :5] for x in maps], norms, gradient[:, :5],
                             shortcut[:, :5] if has_shortcut else None, relu)
        found = results(sum_of_batch_norms, maps, norms, gradient, shortcut, relu)
        for name in found:
            if name == "sum" or name.startswith(("gradient of map", "gradient of shortcut")):
                if found[name][:, 5:].any():
                    wrong.append(f"{name}: not zero behind its channels")
                found[name] = found[name][:, :5]
        wrong += differences(found, expected, 1e-5)
    return wrong


def hidden_nan_failures() -> list[str]:
    """A ReLU lets NaN pass: what diverges is to be noticed."""
    maps, norms = make_maps(1, (2, 3, 4, 4), LAST), make_norms(1, 3)
    maps[0][0, 1, 2, 3] = torch.nan
    out = sum_of_batch_norms(maps, norms, relu=True)
    return [] if out[:, 1].isnan().all() and not out[:, 2].isnan().any() else ["NaN is cut off"]


def network_failures(device: str) -> list[str]:
    """All that ResNets call, nothing of it by plain_sum, against their own layers in float64."""
    wrong = []
    for options in (dict(block="basic", drop_path=0.5),
                    dict(block="bottleneck", deep_stem=True, avg_down=True)):
        network = ResNet(7, depths=(2, 1), dims=(8, 12), zero_init_residual=False, **options)
        network, images = network.to(device, memory_format=LAST), torch.randn(3, 3, 16, 16)
        set_launches_free(network, True)
        images, gradients = images.to(device, memory_format=LAST), []
        for model in (copy.deepcopy(network).double(), network):
            torch.manual_seed(0)  # what drop path drops
            with ExitStack() as stack:
                for module in (batch_norm, resnet) if model is network else ():
                    stack.enter_context(mock.patch.object(module, "plain_sum", None))
                model(images.to(model.fc.weight.dtype)).square().sum().backward()
            gradients.append({name: value.grad for name, value in model.named_parameters()}
                             | {name: value.double() for name, value in model.named_buffers()})
        wrong += differences(gradients[1], gradients[0], 1e-4)
    return wrong


def captured_failures() -> list[str]:
    """A CUDA graph goes on with the running statistics."""
    maps, norms = [x.cuda() for x in make_maps(1, (4, 64, 9, 9), LAST)], make_norms(1, 64)
    norms = [norm.cuda() for norm in norms]
    expected = copy.deepcopy(norms)
    maps[0].requires_grad_()
    sum_of_batch_norms(maps, norms, relu=True).sum().backward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sum_of_batch_norms(maps, norms, relu=True)
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        expected[0](maps[0])
    return differences(norms[0].state_dict(), expected[0].double().state_dict(), 1e-5)


def separate_biases_failures() -> list[str]:
    """Equal gradients must not share memory: clipping would scale them several times."""
    norms = make_norms(3, 4)
    sum_of_batch_norms(make_maps(3, (2, 4, 3, 3)), norms).sum().backward()
    places = {norm.bias.grad.data_ptr() for norm in norms}
    return [] if len(places) == 3 else ["gradients of biases share memory"]


def failures(device: str) -> list[str]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what empty returns with NaN
    if device == "cpu":  # small tiles, so that few positions make several
        batch_norm.CONTIGUOUS, batch_norm.TURNED = (64, 1, 1, 4, 12), (32, 8, 1, 8, 4)
        batch_norm.TILES = {key: (16 if fold == 1 else 32, 64, fold, 4, 4)
                            for key, (_, _, fold, _, _) in batch_norm.TILES.items()}
    found = [line for i, case in enumerate(CASES)
             for line in compare(case, list(TOLERANCES)[i % 3], device=device)]
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        for case in ON_A_GPU:
            found += compare(case, torch.bfloat16, device=device)
        found += captured_failures()
    else:
        for case in (CASES[1], CASES[5], CASES[7]):  # above in half precision
            found += compare(case, torch.float32)
        found += compiled_failures() + padded_failures() + separate_biases_failures()
        found += hidden_nan_failures()
    found += network_failures(device)
    TOLERANCES[torch.float32] = 1e-3  # of what 24 bits leave of a mean 1000 times the deviation
    return found + compare(CASES[0], torch.float32, 1000.0, device)


# Two processes


def process_failures(rank: int, port: str) -> list[str]:
    """nn.SyncBatchNorm's sums, from batches of two sizes, against one process that has them all."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    maps, norms = make_maps(2, (5, 3, 4, 3)), make_norms(2, 3)
    gradient = torch.randn(5, 3, 4, 3)
    shortcut = torch.randn(5, 3, 4, 3)
    expected = in_double(maps, norms, gradient, shortcut, True)
    synced = [nn.SyncBatchNorm.convert_sync_batchnorm(norm) for norm in norms]
    mine = slice(0, 2) if rank == 0 else slice(2, 5)
    assert can_fuse(maps, synced)
    found = results(sum_of_batch_norms, [x[mine] for x in maps], synced, gradient[mine],
                    shortcut[mine], True)
    for name, value in found.items():
        if name.startswith(("gradient of weight", "gradient of bias")):
            dist.all_reduce(value)  # DDP's part
        if name == "sum" or name.startswith(("gradient of map", "gradient of shortcut")):
            expected[name] = expected[name][mine]
    return differences(found, expected, 1e-5)


@on_both
def test_kernels_equal_the_modules(device):
    check_comparisons(__file__, device)


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
@pytest.mark.parametrize("has_shortcut", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_without_kernels_the_modules_are_called(training, has_shortcut, relu, layout):
    maps, norms = make_maps(3, (4, 6, 5, 5), layout), make_norms(3, 6)
    options = dict(shortcut=torch.randn(4, 6, 5, 5) if has_shortcut else None, relu=relu)
    norms[1] = nn.Identity()
    for norm in norms:
        norm.train(training)
    twins = copy.deepcopy(norms)
    assert torch.equal(sum_of_batch_norms(maps, norms, **options), plain(maps, twins, **options))
    for norm, twin in zip(norms, twins):
        for name, value in norm.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name])


@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_what_replaces_modules_of_a_resnet_is_called(layout):
    network = ResNet(5, "bottleneck", depths=(1,), dims=(4,)).to(memory_format=layout)
    block, images, seen = network.layer1[0], torch.randn(2, 3, 32, 32), []
    for module in (block.downsample, block.relu, block.bn3, network.relu):
        module.register_forward_hook(lambda module, *values: seen.append(module))
    block.bn1, block.bn2 = nn.GroupNorm(2, 4), nn.Identity()
    network(images.contiguous(memory_format=layout))
    assert seen == [network.relu, block.relu, block.relu, block.downsample, block.bn3, block.relu]
    block.drop_path = nn.Identity()
    block.drop_path.register_forward_hook(lambda module, *values: seen.append(module))
    network(images.contiguous(memory_format=layout))
    assert seen[-4:] == [block.bn3, block.drop_path, block.downsample, block.relu]


def test_a_map_that_nothing_normalizes_is_left_as_it_is():
    x, = make_maps(1, (2, 3, 4, 4))
    before = x.clone()
    assert torch.equal(sum_of_batch_norms([x], [nn.Identity()], relu=True), before.relu())
    assert torch.equal(x, before)


def sums(monkeypatch, *, layout: torch.memory_format = LAST, are_free: bool = True,
         watched: str | None = None) -> int:
    """How many of the three normalized maps of a ResNet are given to sum_of_batch_norms."""
    called = mock.Mock(wraps=sum_of_batch_norms)
    monkeypatch.setattr(resnet, "sum_of_batch_norms", called)
    network = ResNet(5, "basic", depths=(1,), dims=(4,)).to(memory_format=layout)
    set_launches_free(network, are_free)
    if watched is not None:
        network.get_submodule(watched).register_forward_hook(lambda *values: None)
    network(torch.randn(2, 3, 32, 32).contiguous(memory_format=layout))
    monkeypatch.undo()
    return called.call_count


def test_which_maps_of_a_resnet_take_few_passes(monkeypatch):
    assert sums(monkeypatch) == 3 and sums(monkeypatch, are_free=False) == 0
    assert sums(monkeypatch, layout=FIRST) == 0
    assert sums(monkeypatch, watched="relu") == 2
    assert sums(monkeypatch, watched="layer1.0.relu") == 1
    for is_traced in traced():
        with is_traced:
            assert sums(monkeypatch) == 0


def test_which_maps_of_a_large_kernel_take_few_passes(monkeypatch):
    called = mock.Mock(wraps=sum_of_batch_norms)
    monkeypatch.setattr(slak, "sum_of_batch_norms", called)
    mixer, edge = slak.LargeKernel(2, 5, 3, True, True), round(slak.FUSED_FROM ** 0.5)
    for are_free, size, expected in ((False, edge, 1), (False, edge - 1, 0), (True, 3, 1)):
        called.reset_mock()
        set_launches_free(mixer, are_free)
        mixer(torch.randn(1, 2, size, size))
        assert called.call_count == expected, (are_free, size)


def test_what_the_kernels_do_not_compute_is_noticed(monkeypatch):
    monkeypatch.setattr(batch_norm, "has_kernels", lambda device: True)
    maps, watched = make_maps(2, (2, 4, 3, 3)), nn.BatchNorm2d(4)
    watched.register_forward_hook(lambda *values: None)
    assert can_fuse(maps, make_norms(2, 4)) and can_fuse(
        maps, [nn.SyncBatchNorm(4), nn.SyncBatchNorm(4)])
    for options in (dict(affine=False), dict(track_running_stats=False), dict(momentum=None),
                    dict(eps=1e-3)):
        assert not can_fuse(maps, [nn.BatchNorm2d(4), nn.BatchNorm2d(4, **options)])
    for other in (nn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4).bfloat16(), nn.Identity(),
                  nn.SyncBatchNorm(4), watched):
        assert not can_fuse(maps, [nn.BatchNorm2d(4), other])
        assert not can_fuse(maps, [other, nn.BatchNorm2d(4)])
    for wrong in ([x.double() for x in maps], [x[:1, :, :1, :1] for x in maps],
                  [maps[0], maps[1][:1]], [maps[0], maps[1].bfloat16()]):
        assert not can_fuse(wrong, make_norms(2, 4))
    for wrong in (maps[0].bfloat16(), maps[0][:, :1]):
        assert can_fuse(maps, make_norms(2, 4), maps[0])
        assert not can_fuse(maps, make_norms(2, 4), wrong)
    assert not can_fuse(maps * 2, make_norms(4, 4))
    assert not can_fuse(maps, make_norms(2, 5)) and can_fuse(maps, make_norms(2, 3))
    assert not can_fuse(maps, [nn.BatchNorm2d(3), nn.BatchNorm2d(4)])


if __name__ == "__main__":
    tell(failures(sys.argv[1]) if len(sys.argv) == 2 else process_failures(int(sys.argv[1]),
                                                                           sys.argv[2]))
