"""The benchmarks measure what they say, at any size; no time is tested."""
import copy
import json
import statistics

import pytest
import torch

import data
from analysis.benchmark import common
from analysis.benchmark.__main__ import COMMANDS, main
from analysis.benchmark.cached import UPDATES_FILLED, UPDATES_KEPT, open_cache
from analysis.benchmark.common import Stopwatch, ceilings, table, time_interleaved
from analysis.benchmark.masking import COLUMNS, rows_of
from analysis.benchmark.operator import Shape, shapes_of
from analysis.benchmark.published import Branches
from analysis.benchmark.step import METRICS, PHASES, build_networks, build_steps, lapped
from models import create_model
from models.base import IMAGENET_MEAN, IMAGENET_STD
from models.distiller import FrozenTeacher
from models.kept_logits import compact, dense
from models.large_kernel.operator import LargeKernelModule
from tests.test_bench_loader import make_photographs

MASKING = ["masking", "--model", "slak_pico", "--input-size", "16", "--batch-size", "2"]
OPERATOR = ["operator", "--model", "slak_pico", "--input-size", "32", "--batch-size", "2"]
TEACHER = ["teacher", "--models", "slak_pico", "resnet_nano", "--input-size", "32",
           "--batch-size", "2"]
STEP = ["step", "--input-size", "32", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    monkeypatch.setitem(common.COPY_BYTES, "cpu", 2 ** 20)
    monkeypatch.setitem(common.MATRIX_EDGE, "cpu", 64)
    monkeypatch.setattr(common, "SHORTEST", 1e-4)


@pytest.fixture
def run(tmp_path, capsys):
    """words -> (what was printed, the values)"""
    def run(words: list[str]) -> tuple[str, dict]:
        path = tmp_path / "out.json"
        assert main([*words, "--repeats", "2", "--json", str(path)]) == 0
        return capsys.readouterr().out, json.loads(path.read_text())
    return run


def lines_of(printed: str) -> list[list[str]]:
    """The cells of the one table."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert sum(line.startswith("|---") for line in lines) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in cells}) == 1
    return cells[2:]


@pytest.mark.parametrize("words", [[], ["--amp", "bf16", "--growth", "gradient"]])
def test_masking(words, run):
    printed, values = run([*MASKING, *words])
    assert [line[0] for line in lines_of(printed)] == [
        "no masks", "masks", "masks that change", "mean at --prune-every 100"]
    assert 0 < values["bytes_per_weight"] <= 1
    assert len(values["masks"]) == 2 and values["ratio"] > 0


def test_the_mean_counts_the_change_once():
    seconds = {"no masks": [1.0], "masks": [2.0], "masks that change": [102.0]}
    seconds |= {f"gradients of {kind}": [9.0] for kind in list(seconds)}
    rows = rows_of(seconds, 100)
    assert rows[-1]["ratio"] == pytest.approx((9 + 3) / (9 + 1))
    assert "| masks | 9.000 | 2.000 | 1.100 |" in table(rows, COLUMNS)


# operator


def test_shapes_come_from_the_model():
    """slak_pico: stages of one and two blocks, kernels 15 and 7 with 3."""
    with torch.device("meta"):
        shapes = shapes_of(create_model("slak_pico"), 32)
        folded = shapes_of(create_model("slak_pico").fold(), 32)
    assert shapes == {Shape(48, 8, 8, ((15, 3), (3, 15), (3, 3))): 1,
                      Shape(96, 4, 4, ((7, 3), (3, 7), (3, 3))): 2}
    assert [shape.kernels for shape in folded] == [((15, 3), (3, 15)), ((7, 3), (3, 7))]


def test_multiply_adds_leave_out_what_no_pixel_reaches():
    assert Shape(3, 4, 4, ((7, 3), (3, 51))).macs(2) == 2 * 3 * 16 * (7 * 3 + 3 * 7)


@pytest.mark.parametrize("dtype, tolerance", [("none", 1e-5), ("bf16", 0.02)])
def test_operator(dtype, tolerance, run):
    printed, values = run([*OPERATOR, "--dtype", dtype])
    rows = values["rows"]
    names = [row["backend"] for row in rows]
    assert {"published", "conv", "banded", "torch"} <= set(names)
    assert [line[1].removesuffix(" (auto)") for line in lines_of(printed)] == names
    assert all(row["error"] <= tolerance for row in rows)
    assert "conv (auto)" in printed
    for row in rows:
        base = next(other for other in rows if other["stage"] == row["stage"])
        assert base["backend"] == "published" and base["error"] == 0
        for kind in ("forward", "backward"):
            assert row[f"{kind}_ratio"] == pytest.approx(base[f"{kind}_ms"] / row[f"{kind}_ms"])
            if row["stage"] != "all":
                seconds = values["seconds"][
                    f"stage {row['stage']}, {row['backend']}, {kind}"]
                assert row[f"{kind}_ms"] == pytest.approx(1000 * statistics.median(seconds))
    conv = [row for row in rows if row["backend"] == "conv"]
    assert conv[-1]["stage"] == "all" and conv[-1]["blocks"] == 3
    assert conv[-1]["forward_ms"] == pytest.approx(
        conv[0]["forward_ms"] + 2 * conv[1]["forward_ms"])
    assert conv[0]["backward_macs"] == 3 * conv[0]["forward_macs"] > 0
    assert conv[0]["copy_share"] == pytest.approx(
        2 * 2 * 48 * 64 * common.dtype_of(dtype).itemsize / conv[0]["forward_ms"] / 1e6
        / values["copy_gb_per_second"])


def test_operator_summed_at_one_shape(run):
    printed, values = run(["operator", "--only-sum", "--shape", "3", "8", "8", "--kernel", "9",
                            "3", "--backends", "banded", "conv", "--batch-size", "2"])
    assert [line[:2] for line in lines_of(printed)] == [
        ["3 x 8 x 8, 9x3, 3x9", name] for name in ("published", "banded", "conv (auto)")]
    row = values["rows"][1]
    assert row["backward_macs"] == 2 * row["forward_macs"] == 2 * 2 * 3 * 64 * 54
    assert row["error"] < 1e-5


def test_operator_folded_model(run):
    printed, values = run([*OPERATOR, "--only-sum", "--backends", "conv"])
    assert [row["stage"] for row in values["rows"]] == [1, 1, 2, 2, "all", "all"]
    assert "folded, summed" in printed


# teacher


def test_teacher(run):
    printed, values = run(TEACHER)
    rows = values["rows"]
    ours = "ours, large kernels by conv"
    expected = [["slak_pico", "none", "published"], ["slak_pico", "none", ours],
                ["slak_pico", "bf16", "published"], ["slak_pico", "bf16", ours],
                ["resnet_nano", "none", "ours"], ["resnet_nano", "bf16", "ours"]]
    assert [[line[0], *line[2:4]] for line in lines_of(printed)] == expected
    for row, (name, precision, kind) in zip(rows, expected):
        seconds = values["seconds"][f"{precision}, {name}, {kind.split(',')[0]}"]
        assert row["ms_per_image"] == pytest.approx(1000 * statistics.median(seconds) / 2)
        assert row["error"] < (1e-5 if precision == "none" else 0.1)
    for published, ours in (rows[:2], rows[2:4]):
        assert published["ratio"] == 1
        assert ours["ratio"] == pytest.approx(published["ms_per_image"] / ours["ms_per_image"])
    assert rows[0]["error"] == 0 and rows[4]["ratio"] is None
    assert set(values["ceilings"]) == {"none", "bf16"}


# step


@pytest.mark.parametrize("words", [
    ["--teacher", "slak_pico", "--student", "convnext_bn_pico"],
    ["--teacher", "slak_pico", "--student", "resnet_nano", "--loss", "nkd", "temperature=2",
     "--loss", "ce", "--amp", "bf16", "--accum-steps", "2"],
    ["--teacher", "none", "--student", "slak_pico", "--large-kernel", "banded"]])
def test_step(words, run):
    printed, values = run([*STEP, *words])
    published, ours = values["rows"]
    assert [line[0] for line in lines_of(printed)] == ["published", "ours"]
    images = 4 if "--accum-steps" in words else 2
    for row in (published, ours):
        assert row["seconds"] == statistics.median(values["seconds"][row["step"]])
        assert row["images_per_second"] == pytest.approx(images / row["seconds"])
        assert row["ratio"] == pytest.approx(published["seconds"] / row["seconds"])
    assert ("the teacher metrics" in printed) == (METRICS in values["seconds"]) == (
        "none" not in words[:2])
    medians = {name: statistics.median(values["seconds"][name]) for name in PHASES}
    for name in PHASES:
        assert len(values["seconds"][name]) == 2 and published[name] is None
        assert ours[name] == pytest.approx(medians[name] / sum(medians.values()))
        assert (ours[name] == 0) == (name == "teacher forward" and "none" in words)


def test_the_steps_differ_as_they_say():
    device = torch.device("cpu")
    student, teacher, macs, macs_alone = build_networks(["slak_pico", "layer_scale_init=0.5"],
                                                        ["slak_pico"], 32)
    assert 3 * macs == 4 * macs_alone == 12 * create_model("slak_pico").count_macs(32)
    steps, _ = build_steps(student, teacher, [["nkd"]], common.random_batches(2, 32, 1000, device),
                        common.step_options(device, "none"), has_published=True,
                        backend="banded", compiled="none", cuda_graphs=False, timm_name=None)
    published, ours = steps["published"], steps["ours"]
    assert published.options.memory_format == torch.contiguous_format
    students = [step.state.distiller.student for step in (published, ours)]
    assert [sum(isinstance(module, Branches) for module in student.modules())
            for student in students] == [3, 0]
    before = [copy.deepcopy(student.state_dict()) for student in students]
    for step in (published, ours, lapped(ours, Stopwatch())):
        step()
    for student, state in zip(students, before):
        assert not torch.equal(student.head.weight, state["head.weight"])
    assert all(p.grad is not None for p in published.teacher.model.parameters())
    assert any(p.grad.abs().max() > 0 for p in published.teacher.model.parameters())
    assert all(p.grad is None for p in ours.teacher.parameters())
    assert {module.backend for network in (ours.teacher, students[1])
            for module in network.modules() if isinstance(module, LargeKernelModule)} == {"banded"}


def test_step_without_published(run):
    printed, values = run([*STEP, "--teacher", "slak_pico", "--student", "resnet_nano",
                            "--no-published"])
    assert [line[:3:2] for line in lines_of(printed)] == [["ours", "-"]]


def test_step_from_a_cache(run):
    printed, values = run([*STEP, "--teacher", "slak_pico", "--student", "resnet_nano",
                            "--no-published", "--teacher-cache", "--accum-steps", "2"])
    assert [line[0] for line in lines_of(printed)] == ["supervised", "from the cache", "ours"]
    assert "keeps 64 of 1000 classes. It is filled at" in printed
    macs = [row["gmacs_per_second"] * row["seconds"] for row in values["rows"]]
    assert macs[0] == pytest.approx(macs[1]) and macs[0] < macs[2]
    for row in values["rows"]:
        ratios = [a / b for a, b in zip(values["seconds"][row["step"]],
                                        values["seconds"]["supervised"])]
        assert row["over_supervised"] == pytest.approx(statistics.median(ratios))


@pytest.mark.parametrize("top", [0, 10])
def test_the_cache_of_a_benchmark_is_the_programs(top, tmp_path):
    """Filled by asking the network, then read without it, in turn."""
    torch.manual_seed(0)
    network = FrozenTeacher(create_model("slak_pico"), IMAGENET_MEAN, IMAGENET_STD)
    batches = common.random_batches(2, 32, 1000, torch.device("cpu"))
    mix = data.Mixup(1000).at
    cache = open_cache(tmp_path, network, batches, mix, common.step_options(
        torch.device("cpu"), "none", 2), batch_size=2, input_size=32, top=top)
    cache.teacher.network = None
    batch = next(batches)
    for step in range(2 * UPDATES_KEPT["cpu"]):
        for micro in range(2):
            position = cache.options.position(step, micro)
            images, _ = mix(*cache.options.to_device(batch.images, batch.labels), position)
            expected = dense(compact(network(images), top), 1000)
            assert torch.equal(cache.teacher.teach(images, position).logits, expected)
    cache.fill()
    cache.fill()
    files = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("*/epoch-*"))]
    name = "log_probs" if top else "logits"
    number = 2 * 2 * UPDATES_FILLED["cpu"]
    assert len(files) == 2 and len(files[0][name]) == number
    assert torch.equal(files[0][name], files[1][name][:number])
    cache.teacher.close()


def test_loader(tmp_path, run):
    make_photographs(tmp_path / "photographs")
    printed, values = run(["loader", "--data-path", str(tmp_path / "photographs"),
                            "--input-size", "40", "--batch-size", "2"])
    assert [line[0] for line in lines_of(printed)] == [row["pipeline"] for row in values["rows"]]
    assert lines_of(printed)[0][2] == "1.00"


# What they share


def test_short_actions_are_repeated():
    calls = []
    device = torch.device("cpu")
    seconds = time_interleaved({"short": lambda: calls.append(0)}, 2, device, shortest=1e-3)
    assert len(calls) > 100 and len(seconds["short"]) == 2
    calls.clear()
    time_interleaved({"short": lambda: calls.append(0)}, 2, device)
    assert len(calls) == 3


def test_ceilings_count_what_they_say():
    found = ceilings({"copy": [1e-3, 5, 1e-3], "matrix product": [1e-6]}, torch.device("cpu"),
                     torch.float32)
    assert found == pytest.approx({"copy_gb_per_second": 2 * 2 ** 20 / 1e6,
                                   "matrix_gmacs_per_second": 64 ** 3 / 1e3})


def test_a_table():
    columns = [("a", "x", ""), ("b", "y", ".1f"), ("c", "z", ".1%")]
    assert table([{"x": "t", "y": 1, "z": 0.5}, {"x": "t", "y": None, "z": 1}], columns) == (
        "| a | b | c |\n|---|---:|---:|\n| t | 1.0 | 50.0 % |\n| t | - | 100.0 % |")


def test_laps_add_up(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    watch = Stopwatch(torch.device("cpu"))
    for name in ("a", "b", "a"):
        watch.lap(name)
    assert watch.seconds == {"a": 8.0, "b": 2.0}


def test_threads(run):
    printed, values = run([*OPERATOR, "--threads", "2", "--backends", "torch"])
    assert "2 thread(s)" in printed and torch.get_num_threads() == 2
    assert values["place"] == "CPU, 2 thread(s)" and values["peak_memory_gib"] > 0


def test_help(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"benchmark {name}" in printed for name in COMMANDS)


@pytest.mark.parametrize("words, telling", [
    ([], "got 'nothing'"), (["mask"], "Did you mean 'masking'"),
    (["masking", "--repeats", "0"], "--repeats must be at least 1"),
    (["masking", "--model", "vit_nano", "--input-size", "32"], "takes 224 px only"),
    (["masking", "--batch-size", "1"], "--batch-size must be at least 2"),
    (["masking", "--model", "slak"], "unknown model"),
    (["masking", "--model", "resnet_nano", "--sparsity", "1"], "--sparsity must be in [0, 1)"),
    (["operator", "--teacher", "slak_t"], "See analysis.benchmark operator --help"),
    (["teacher", "--sparsity", "0"], "See analysis.benchmark teacher --help"),
    (["loader", "--data-path", "x", "--device", "cpu"], "See analysis.benchmark loader --help"),
    (["operator", "--device", "cpu", "--backends", "triton"], "cannot run on cpu"),
    (["operator", "--backends", "bandit"], "invalid choice: 'bandit'"),
    (["operator", "--model", "resnet_nano"], "no large depthwise kernels"),
    (["operator", "--shape", "3", "0", "8"], "--shape must be at least 1"),
    (["operator", "--shape", "3", "8", "8", "--kernel", "8", "3"], "two odd numbers"),
    (["operator", "--shape", "3", "8", "8", "--kernel", "5", "7"], "the larger first"),
    (["step", "--batch-size", "3"], "--batch-size must be even"),
    ([*TEACHER, "--large-kernel", "triton", "--device", "cpu"], "cannot run on cpu"),
    (["operator", "--json", "nowhere/at/all.json"], "not a file in an existing folder"),
    (["teacher", "--models", "slak"], "unknown model"),
    ([*STEP, "--teacher", "slak_pico", "--student", "resnet_nano", "--large-kernel", "triton",
      "--device", "cpu"], "--large-kernel triton cannot run on cpu"),
    ([*STEP, "--teacher", "none", "--loss", "nkd", "--student", "slak_pico"], "there is none"),
    ([*STEP, "--teacher", "vit_nano", "--student", "resnet_nano"], "Set --input-size 224"),
    ([*STEP, "--teacher", "none", "--teacher-cache"], "--teacher is none"),
    ([*STEP, "--loss", "fd", "--teacher-cache"], "--loss fd compares feature maps"),
    (["step", "--accum-steps", "0"], "--accum-steps must be at least 1"),
    (["loader"], "--data-path"), (["loader", "--data-path", "nowhere"], "nowhere")])
def test_bad_words(words, telling, capsys):
    assert main(words) == 2
    assert telling in capsys.readouterr().err
