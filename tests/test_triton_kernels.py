"""models/large_kernel/triton.py against PyTorch's convolution and its gradients in float64.

Triton's interpreter must be chosen before Triton is imported, so the comparisons run in a process
of their own: this file, as a script. It prints one line for each comparison that fails.
"""
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from models.large_kernel.triton import BACKEND, triton
from tests.kernels import ON_GPU, ROOT, SUCCESS, needs_gpu, needs_triton, run_script, tell

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the maximum
SLAK = ((51, 5), (5, 51), (5, 5))
# images, channels, (height, width), kernels
CASES = [
    (3, 2, (7, 7), ((13, 5), (5, 13), (5, 5))),
    (9, 1, (14, 14), SLAK),  # more images than one program takes
    (2, 2, (17, 9), (*SLAK, (7, 7))),  # more kernels than one launch takes
    (2, 8, (1, 1), ((51, 5), (5, 5), (1, 1))),  # 8: the largest of few sums may cancel out
    (1, 2, (28, 5), ((1, 1), (7, 7), (3, 1))),  # the first is not the tall one
    (1, 1, (18, 40), ((7, 9), (61, 3))),
]
BIG = (1, 1, (70, 66), ((51, 3), (3, 51)))  # more than one tile, reached from afar


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the maximum; NaN, which no tolerance admits, where something was left unwritten."""
    return ((got.cpu().double() - expected).abs().max() / expected.abs().max()).item()


def references(x, kernels, gradients):
    """Outputs, input gradient, kernel gradients and input gradient of the sum, in float64."""
    x, kernels = x.cpu().double().requires_grad_(), [k.cpu().double().requires_grad_()
                                                     for k in kernels]
    outputs = [F.conv2d(x, k, padding=(k.shape[2] // 2, k.shape[3] // 2), groups=x.shape[1])
               for k in kernels]
    gradients = [g.cpu().double() for g in gradients]
    by_branch = torch.autograd.grad(outputs, [x, *kernels], gradients, retain_graph=True)
    of_sum = torch.autograd.grad(outputs, [x, *kernels], [gradients[0]] * len(kernels))
    return [y.detach() for y in outputs], by_branch, of_sum


def comparisons(case, dtype: torch.dtype, device: str, channels_last: bool):
    """(what, got, expected) of every method."""
    num_images, channels, size, sizes = case
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, *gradients = [torch.randn(num_images, channels, *size).to(device, dtype).contiguous(
        memory_format=layout) for _ in (None, *sizes)]
    # Parameters stay in float32 under autocast; what they are rounded to is no error of BACKEND.
    kernels = [torch.randn(channels, 1, *edges).to(dtype).float().to(device) for edges in sizes]
    outputs, by_branch, of_sum = references(x, kernels, gradients)
    prepared = BACKEND.prepare(x, kernels)
    same = gradients[:1] * len(sizes)
    for bias in (torch.zeros(channels), torch.randn(channels)):
        yield ("total", BACKEND.total(x, kernels, prepared, bias.to(device)),
               sum(outputs) + bias.double().view(-1, 1, 1))
    yield from zip(["outputs"] * len(sizes), BACKEND.outputs(x, kernels), outputs)
    for name, given, expected in (("each", gradients, by_branch), ("one", same, of_sum)):
        yield f"input gradient, {name}", BACKEND.input_gradient(given, kernels), expected[0]
        found = BACKEND.kernel_gradients(x, given, kernels)
        assert all(gradient.dtype == torch.float32 for gradient in found)
        yield from zip([f"kernel gradient {k}, {name}" for k in sizes], found, expected[1:])


def failures(device: str, has_all: bool) -> list[str]:
    """Every case in every dtype if `has_all`, else one dtype each and the first case in all: the
    interpreter takes seconds for a case."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what empty returns with NaN
    runs = [(case, dtype) for i, case in enumerate(CASES) for j, dtype in enumerate(TOLERANCES)
            if has_all or i == 0 or i % 3 == j] + [(BIG, torch.float16)]
    found, worst = [], dict.fromkeys(TOLERANCES, 0.0)
    for number, (case, dtype) in enumerate(runs):
        for what, got, expected in comparisons(case, dtype, device, number % 2 == 1):
            error = relative_error(got, expected)
            worst[dtype] = max(worst[dtype], error)
            last = what.startswith("input")
            layout = torch.channels_last if last else torch.contiguous_format
            if (not error <= TOLERANCES[dtype] or not got.is_contiguous(memory_format=layout)
                    or got.dtype not in (dtype, torch.float32)):
                found.append(f"{what} of {case} in {dtype}: error {error:.1e}, {got.dtype}")
    print("largest errors:", worst)
    return found


@needs_triton
def test_interpreted_kernels_equal_convolutions():
    said = run_script(__file__, "cpu", TRITON_INTERPRET="1")
    assert SUCCESS in said, said


@needs_triton
@pytest.mark.slow
def test_interpreted_kernels_equal_convolutions_in_every_dtype():
    said = run_script(__file__, "cpu", "all", TRITON_INTERPRET="1")
    assert SUCCESS in said, said


@needs_triton
@needs_gpu
def test_kernels_on_a_gpu_equal_convolutions():
    said = run_script(__file__, "cuda", "all", **ON_GPU)
    assert SUCCESS in said, said


def test_cpu_is_refused_in_a_sentence():
    reason = BACKEND.why_not(torch.device("cpu"))
    if os.environ.get("TRITON_INTERPRET") == "1" and triton:
        assert reason is None
    else:
        assert reason.endswith(".") and ("GPU" in reason or "installed" in reason)


def test_missing_triton_is_said_when_asked_not_when_imported():
    code = ("import sys; sys.modules['triton'] = None; import torch\n"
            "from models.large_kernel.triton import BACKEND\n"
            "print(BACKEND.why_not(torch.device('cpu')))")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert run.stdout == "Triton is not installed.\n", run.stderr


def test_wrong_arguments_are_named():
    x, kernel, bias = torch.zeros(1, 2, 8, 8), torch.zeros(2, 1, 5, 3), torch.zeros(2)
    for call in (lambda: BACKEND.total(x.double(), [kernel], [], bias),
                 lambda: BACKEND.total(x, [], [], bias),
                 lambda: BACKEND.total(x, [kernel.repeat(2, 1, 1, 1)], [], bias),
                 lambda: BACKEND.outputs(x, [kernel[..., :2]]),
                 lambda: BACKEND.input_gradient([x], [kernel, kernel]),
                 lambda: BACKEND.kernel_gradients(x, [x[:, :, 1:]], [kernel])):
        with pytest.raises(ValueError, match="got"):
            call()


if __name__ == "__main__":
    tell(failures(sys.argv[1], has_all=sys.argv[2:] == ["all"]))
