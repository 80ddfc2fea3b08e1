"""A captured step is the direct one: on a GPU by CUDA graphs, on a CPU by a stand-in that replays
as they do, into the tensors of the recording."""
import argparse
import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import engine
import train_kd
from models import create_model
from models.base import IMAGENET_MEAN, IMAGENET_STD
from models.distiller import Distiller, FrozenTeacher
from models.layers import LaunchAware, set_launches_free
from tests.helpers import (
    make_batch,
    make_batches,
    make_options,
    make_state,
    make_teacher,
    micro_convnext_bn,
    no_mix,
)
from tests.kernels import ON_GPU, SUCCESS, needs_gpu, run_script, tell
from tests.test_train import REPOSITORY, SMALL, TAUGHT, assert_identical, torchrun
from utils.cuda_graphs import WARM_UPS, Captured, tensors_of
from utils.faults import has_cuda_graphs
from utils.registry import UserError

NUM_STEPS = WARM_UPS + 4


class Replayed(Captured):
    """Does on a CPU what Captured does on a GPU."""

    device_type = "cpu"

    def __init__(self, what: str = "it", module: nn.Module | None = None) -> None:
        self.module = module or nn.Identity()  # whose state a recording leaves as it was
        super().__init__(what, self.module.parameters(), is_on=True)

    def _on_stream(self, call):
        return call()

    def _watched(self, call):
        return call(), False

    def _capture(self, call):
        before = copy.deepcopy(self.module.state_dict())
        outputs = call()  # computes, which a recording does not: undone
        self.module.load_state_dict(before)
        gradients = [parameter.grad for parameter in self.parameters]

        def replay() -> None:
            for parameter in self.parameters:
                parameter.grad = None
            found = call()
            with torch.no_grad():
                for kept, new in zip(tensors_of(outputs), tensors_of(found)):
                    kept.copy_(new)
                for kept, parameter in zip(gradients, self.parameters):
                    if kept is not None:
                        kept.copy_(parameter.grad)

        return replay, outputs


def run(is_captured: bool, device: str, *, accum_steps: int = 1, loss: dict | None = None,
        drop_path: float = 0.0, amp_dtype: torch.dtype | None = None, has_frozen: bool = False,
        is_disturbed: bool = False, is_compiled: bool = False) -> engine.TrainState:
    """NUM_STEPS updates of a student, from the same start on the same images. `is_disturbed`: by an
    evaluation and a smaller batch, when the graphs are there."""
    torch.manual_seed(0)
    teacher = make_teacher().to(device)
    student = micro_convnext_bn(drop_path=drop_path)
    student.downsample_layers.requires_grad_(not has_frozen)
    set_launches_free(student, True)  # as for a captured step
    state = make_state(student, loss or {"nkd": {}, "fd": {}}, teacher, ema=True)
    for network in (state.distiller, state.ema.model):
        network.to(device)
    state.scaler = torch.amp.GradScaler(device, enabled=amp_dtype is torch.float16)
    if is_compiled:
        teacher.compile()
    if is_captured and device == "cuda":
        teacher.capture()
        state.captured = state.distiller.capture()
    elif is_captured:
        teacher.captured = Replayed("the teacher", teacher)
        state.captured = Replayed("the step", state.distiller)
    options = make_options(device=torch.device(device), accum_steps=accum_steps,
                           amp_dtype=amp_dtype)
    state.wrapped.train()
    batches = make_batches(NUM_STEPS * accum_steps)
    if is_disturbed:
        batches[-2] = make_batch(batches[-2].images[:3], batches[-2].labels[:3])
    queue = iter(batches)
    for number in range(NUM_STEPS):
        engine.accumulate_gradients(state, queue, teacher, no_mix, options)
        engine.optimizer_update(state, clip_grad=1.0)
        if is_disturbed and number > WARM_UPS:
            images = batches[0].images[:2].to(device)
            for network in (teacher, student.eval()):
                network(images)
            student.train()
    if is_captured:
        assert teacher.captured.replay and state.captured.replay
    return state


def difference(found: engine.TrainState, expected: engine.TrainState) -> float:
    """The largest of any weight, statistic or logged mean."""
    pairs = [(mine, theirs) for a, b in ((found.distiller, expected.distiller),
                                         (found.ema.model, expected.ema.model))
             for mine, theirs in zip(a.state_dict().values(), b.state_dict().values())]
    means, expected_means = found.meter.means(), expected.meter.means()
    assert means.keys() == expected_means.keys() and all(map(math.isfinite, means.values()))
    return max(*[(a - b).abs().max().item() for a, b in pairs],
               *[abs(means[name] - expected_means[name]) for name in means])


@pytest.mark.parametrize("options", [
    {}, {"accum_steps": 3}, {"has_frozen": True}, {"is_disturbed": True}], ids=str)
def test_a_replayed_run_is_the_eager_one(options):
    assert difference(*[run(is_captured, "cpu", **options) for is_captured in (True, False)]) == 0


def test_calls_of_other_shapes_are_eager():
    captured = Replayed()
    for number in range(WARM_UPS + 3):
        for size in (4, 5):
            assert torch.equal(captured(torch.square, torch.full((size,), 1. + number)),
                               torch.full((size,), 1. + number) ** 2)
    assert len(captured.inputs[0]) == 4


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(())])
def test_random_numbers_of_the_host_are_not_repeated(draw, capsys):
    captured = Replayed()
    found = {float(captured(lambda x: x * draw(), torch.ones(()))) for _ in range(WARM_UPS + 5)}
    assert len(found) == WARM_UPS + 5
    assert "CUDA graphs: it is launched eagerly, for it draws random numbers on the host" in (
        capsys.readouterr().err)


def test_a_student_knows_whether_its_launches_are_free(monkeypatch):
    for name in ("device_type", "_on_stream", "_watched"):
        monkeypatch.setattr(Captured, name, getattr(Replayed, name))
    student = micro_convnext_bn()

    def are_free() -> set[bool]:
        return {module.launches_are_free for module in student.modules()
                if isinstance(module, LaunchAware)}

    assert are_free() == {False}
    captured = Distiller(student, {}, {}).capture()
    assert are_free() == {True}
    for _ in range(WARM_UPS):
        captured(lambda x: x * random.random(), torch.ones(()))
    assert not captured.is_on and are_free() == {False}


def recorded_with(error: BaseException, monkeypatch) -> tuple[Replayed, nn.Module]:
    """A call that is recorded in the middle of an update, which fails."""
    def fail(self, call):
        call()
        raise error

    monkeypatch.setattr(Replayed, "_capture", fail)
    layer = nn.Linear(2, 1, bias=False)
    captured = Replayed("it", layer)
    for number in range(1, WARM_UPS + 2):
        captured(lambda x: layer(x).sum().backward(), torch.ones(1, 2))
        assert layer.weight.grad.tolist() == [[number, number]]
    return captured, layer


def test_without_memory_for_a_graph_calls_are_eager(capsys, monkeypatch):
    captured, _ = recorded_with(torch.OutOfMemoryError("CUDA out of memory"), monkeypatch)
    assert not captured.is_on and not captured.inputs and not captured.gradients
    assert capsys.readouterr().err.count("memory is too small for a graph") == 1


def test_what_cuda_cannot_record_names_the_flag(monkeypatch):
    with pytest.raises(UserError, match="it cannot be recorded.*not permitted.*--no-cuda-graphs"):
        recorded_with(RuntimeError("operation not permitted"), monkeypatch)


def test_a_copy_records_its_own():
    captured = Captured("it", nn.Linear(2, 1).parameters(), is_on=True)
    captured.replay = "a graph"
    other = copy.deepcopy(captured)
    assert other.is_on and other.replay is None
    assert len(other.parameters) == 2 and other.parameters[0] is not captured.parameters[0]


def test_by_default_only_teachers_that_gain_by_it_are_compiled():
    args = argparse.Namespace(model_ema=False, compile=False, compile_teacher=True,
                              cuda_graphs=False)
    teachers = [FrozenTeacher(create_model(name), IMAGENET_MEAN, IMAGENET_STD)
                for name in ("slak_nano", "vit_nano")]
    for teacher in teachers:
        train_kd.wrap(args, nn.Identity(), teacher, torch.device("cpu"))
    assert [teacher.is_compiled for teacher in teachers] == [False, True]


# On a GPU

ON_A_GPU = {
    "plain": {}, "accumulated": {"accum_steps": 3}, "drop path": {"drop_path": 0.3},
    "disturbed": {"is_disturbed": True}, "frozen": {"has_frozen": True},
    "bf16": {"amp_dtype": torch.bfloat16}, "fp16": {"amp_dtype": torch.float16},
    "other losses": {"loss": {"dkd": {}, "dist": {}, "mgd": {}}},
    "without features": {"loss": {"kd": {}, "ce": {}}}, "compiled": {"is_compiled": True}}
BOUND = 1e-4  # one update at a rate of 1e-3 moves a weight by more


def failures() -> list[str]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # Adam makes much of small differences
    found = []
    for what, options in ON_A_GPU.items():
        apart = difference(*[run(is_captured, "cuda", **options) for is_captured in (True, False)])
        print(f"{what}: {apart:.1e} apart", flush=True)
        if not apart <= BOUND:
            found.append(f"{what}: {apart:.1e} apart")
    captured = Captured("it", is_on=True)  # waits for the GPU
    for i in range(WARM_UPS + 2):
        x = torch.full((3,), float(i), device="cuda")
        if captured(lambda x: x * x.sum().item(), x).tolist() != [3. * i * i] * 3:
            found.append(f"a call that waits, number {i}")
    if captured.is_on or torch.cuda.current_stream() != torch.cuda.default_stream():
        found.append("after calls that wait")
    return found


@needs_gpu
def test_a_graph_is_the_eager_run():
    printed = run_script(__file__, **ON_GPU)
    assert SUCCESS in printed, printed


# Started by torchrun: a run in DistributedDataParallel, and one that averages its gradients itself.
TWO_RUNS = """
import sys
sys.path.insert(0, {root!r})
import train_kd
from utils import distributed, faults

distributed.shutdown, shutdown = lambda: None, distributed.shutdown  # the processes stay together
for name, cuda_graphs in (("within", False), ("after", True)):
    faults.has_cuda_graphs = lambda asked, device: cuda_graphs
    assert train_kd.main([*{words!r}, "--output-dir", {folder!r} + "/" + name]) == 0
shutdown()
"""


def test_gradients_averaged_after_the_backward_pass_are_those_averaged_within(tmp_path):
    program = tmp_path / "program.py"
    words = [*SMALL, *TAUGHT, "--accum-steps", "2", "--batch-size", "4", "--model-ema"]
    program.write_text(TWO_RUNS.format(root=str(REPOSITORY), words=words, folder=str(tmp_path)))
    told = torchrun(program=str(program))
    assert told.count("CUDA graphs: teacher and step") == 1
    within, after = [torch.load(tmp_path / name / "checkpoint-last.pth", weights_only=True)
                     for name in ("within", "after")]
    for part in ("model", "model_ema", "optimizer", "meter"):
        assert_identical(within[part], after[part])


def test_the_flag_needs_a_gpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [has_cuda_graphs(asked, device) for device in (cpu, gpu) for asked in (None, False)] == [
        False, False, True, False]
    with pytest.raises(UserError, match="--cuda-graphs needs an NVIDIA GPU; this run is on cpu"):
        has_cuda_graphs(True, cpu)


if __name__ == "__main__":
    tell(failures())
