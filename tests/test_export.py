"""A student written for other programs is the same function there, and its card says what it is."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from analysis import export
from analysis.card import accuracy, run_of
from analysis.formats import FORMATS, Student, graph_of
from models import create_model, list_models
from models.base import MODELS
from models.weights import load_trained, load_weights
from tests.helpers import fill_by_name, micro_convnext_bn
from utils.checkpoint import save_atomically
from utils.registry import UserError

ROOT = Path(__file__).parent.parent
RUN = {"teacher": ["slak_nano"], "teacher_weights": "far/away/slak.pth", "loss": [["nkd"], ["fd"]],
       "student": ["convnext_bn_nano"], "num_classes": 10, "input_size": 64, "crop_pct": None,
       "data_set": ["outlines"], "train_size": 1234, "epochs": 3, "effective_batch": 30, "lr": 1e-3,
       "seed": 5, "sparsity": 0.0, "steps_per_epoch": 7, "output_dir": "somewhere"}


def smallest_of_each_family() -> list[str]:
    """One name of every class of networks, and a decomposed large kernel."""
    names = sorted(list_models(), key=lambda name: ("_pico" not in name, "_nano" not in name))
    first = {MODELS.builder(name): name for name in reversed(names)}
    return sorted({*first.values(), "slak_pico"})


def make_student(name: str, **options) -> Student:
    options |= {"image_size": 32} if "image_size" in MODELS.defaults(name) and (
        "cswin" not in name) else {}
    model = fill_by_name(create_model(name, 10, **options)).eval()
    size = model.input_size if model.fixed_size else 64
    spec = [name, *(f"{key}={value}" for key, value in options.items())]
    return Student(spec, model, {"student": spec, "num_classes": 10}, None, size)


def images_for(student: Student, number: int = 3) -> torch.Tensor:
    return torch.randn(number, 3, student.input_size, student.input_size,
                       generator=torch.Generator().manual_seed(0))


def check(student: Student, name: str, folder: Path) -> export.Difference | None:
    path = folder / f"x{FORMATS[name].ending}"
    FORMATS[name].write(student, path)
    return export.compare(student, FORMATS[name], path, images_for(student))


@pytest.mark.parametrize("name", smallest_of_each_family())
def test_every_family_is_recorded_for_any_batch(name, tmp_path):
    """Batches of three and of one are compared, of a graph without operators of ours."""
    student = make_student(name)
    found = check(student, "torch-export", tmp_path)
    assert found.largest <= 1e-5 * found.scale
    saved = torch.export.load(tmp_path / "x.pt2")
    assert not [node for node in saved.graph.nodes if node.op == "call_function"
                and "large_kernel" in str(node.target)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in ("slak_pico", "vit_nano")
                                               else pytest.mark.slow)
                                  for name in smallest_of_each_family()])
def test_every_family_as_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    found = check(make_student(name), "onnx", tmp_path)
    assert found.largest <= 1e-4 * found.scale


def test_an_exporter_called_without_this_command_meets_no_operator_of_ours(tmp_path):
    """Neither folded nor prepared, by the tracer of older programs."""
    model = create_model("slak_pico", 3).eval()
    graph = torch.jit.trace(model, torch.zeros(1, 3, 64, 64), check_trace=False).inlined_graph
    kinds = {node.kind() for node in graph.nodes()}
    assert "aten::_convolution" in kinds
    assert {kind.split("::")[0] for kind in kinds} == {"prim", "aten"}
    assert "prim::PythonOp" not in kinds


def test_images_of_any_size(tmp_path):
    student = make_student("slak_pico")._replace(dynamic_size=True)
    assert check(student, "torch-export", tmp_path).largest < 1e-4
    fixed = graph_of(make_student("slak_pico")).module()
    with pytest.raises(Exception, match="(?s)64"):
        fixed(torch.zeros(2, 3, 96, 96))


TIMM = ["convnext_nano", "convnext_bn_nano", "convnextv2_nano", "vit_nano", "resnet18"]
SLOW = ["swin_nano", "resnet50d", "deit_s", "swin_t", "convnext_t_bn"]


@pytest.mark.parametrize("library, name", [
    *[("timm", name) for name in TIMM], ("torchvision", "resnet18"),
    ("torchvision", "mobilenetv3_l"),
    *[pytest.param("timm", name, marks=pytest.mark.slow) for name in SLOW],
    *[pytest.param("torchvision", name, marks=pytest.mark.slow) for name in (
        "swin_t", "convnext_t", "convnext_t_bn", "efficientnet_b3", "vit_b")]])
def test_libraries_load_it_strictly(library, name, tmp_path):
    pytest.importorskip(library)
    student = make_student(name)
    if name.startswith("swin"):
        student = student._replace(input_size=224)
    if name == "vit_b":
        student = student._replace(model=fill_by_name(create_model("vit_b", 10)).eval(),
                                   input_size=224)
    found = check(student, library, tmp_path)
    assert found.largest <= 1e-4 * found.scale and found.agreement == 1


def test_a_network_of_a_library_goes_back_there(tmp_path):
    spec = ["torchvision", "model=shufflenet_v2_x0_5"]
    model = fill_by_name(create_model(spec[0], 10, model="shufflenet_v2_x0_5")).eval()
    student = Student(spec, model, {"student": spec, "num_classes": 10}, None, 64)
    assert check(student, "torchvision", tmp_path).largest == 0


@pytest.mark.parametrize("library, build, words", [
    ("timm", lambda: make_student("slak_nano"), "timm has no counterpart of slak_nano.*onnx"),
    ("timm", lambda: make_student("mobilenetv3_l"), "eps of 1e-5, this network of 0.001"),
    ("torchvision", lambda: make_student("resnet_nano"), "no counterpart of resnet_nano"),
    ("torchvision", lambda: make_student("resnet18", stem="small"),
     "resnet18 stem=small differs from torchvision's resnet18 in conv1.weight"),
    ("convnext", lambda: make_student("resnet_nano"), "ResNet is no ConvNeXt with BatchNorm"),
    ("convnext", lambda: make_student("slak_nano"), "another SLaK")])
def test_formats_that_a_network_cannot_have(library, build, words, tmp_path):
    with pytest.raises(UserError, match=words):
        check(build(), library, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", [micro_convnext_bn, lambda: micro_convnext_bn(bn=False),
                                   lambda: micro_convnext_bn(layer_scale_init=0.0)])
def test_a_convnext_with_batchnorm_is_written_as_the_original(model, tmp_path):
    student = Student(["convnext_bn_nano"], fill_by_name(model()).eval(), {}, None, 64)
    assert check(student, "convnext", tmp_path).largest < 1e-4


def test_another_function_is_deleted(tmp_path):
    student = make_student("convnext_bn_pico")
    path = tmp_path / "x.pth"
    FORMATS["weights"].write(student, path)
    other = student._replace(model=fill_by_name(create_model("convnext_bn_pico", 10), 1).eval())
    with pytest.raises(UserError, match="would not be the same function"):
        export.compare(other, FORMATS["weights"], path, images_for(student))
    assert not path.exists()


# The command


@pytest.fixture
def run(tmp_path):
    """A run folder of three epochs, the second of which was the best."""
    torch.manual_seed(0)
    model = create_model("convnext_bn_nano", 10)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "args.yaml").write_text(yaml.safe_dump(RUN))
    (folder / "log.txt").write_text("".join(json.dumps(
        {"epoch": epoch, "test_acc1": 20.0 + epoch, "teacher_acc1": 47.0}) + "\n"
        for epoch in range(3)))
    save_atomically({"model": model.state_dict(), "args": RUN, "step": 14, "epoch": 2,
                     "classes": [f"class_{i}" for i in range(10)], "optimizer": {}},
                    folder / "checkpoint-best.pth")
    return folder


@pytest.mark.parametrize("name", ["weights", "safetensors", "torch-export", "timm", "convnext"])
def test_the_command_and_the_lines_of_its_card(name, run, tmp_path, capsys):
    for package in {"timm": ["timm"], "safetensors": ["safetensors"]}.get(name, []):
        pytest.importorskip(package)
    out = tmp_path / f"student{FORMATS[name].ending}"
    words = ["--checkpoint", str(run / "checkpoint-best.pth"), "--out", str(out), "--format", name,
             "--images", "4"]
    assert export.main(words if name != "weights" else [*words, "--data-set", "outlines"]) == 0
    said = capsys.readouterr().out
    assert "same best class on 100.0%" in said and ("4 validation images" in said) == (
        name == "weights")
    card = Path(f"{out}.md").read_text()
    for expected in ("# convnext_bn_nano, distilled from slak_nano\n",
                     "weights `slak.pth`, top-1 47.00 %", "`nkd` + `fd`", "1,234 training images",
                     "21.00 % on the validation images after epoch 2 of 3 (n = 1 run, seed 5)",
                     "MIT licence", "short side to 73 px (bicubic)", "largest difference"):
        assert expected in card, expected
    assert "somewhere" not in card and "far/away" not in card
    (lines,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True,
                          text=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and len(lines.strip().splitlines()) <= 5
    assert export.main(words) == 2 and "must be a file that does not exist yet" in (
        capsys.readouterr().err)


@pytest.mark.parametrize("counts", [
    {"step": 14}, {"step": "14", "epoch": 2}, {"step": 15, "epoch": 2}])
def test_a_card_knows_no_accuracy_of_a_file_that_does_not_say_where_it_stands(counts, run):
    path = run / "checkpoint-best.pth"
    assert accuracy(path, None, RUN, run_of(path)).startswith("21.00 %")
    save_atomically({"model": {}, "args": RUN, **counts}, path)
    assert accuracy(path, None, RUN, run_of(path)).startswith("not known")


def test_weights_alone_are_a_checkpoint_for_everything_else(run, tmp_path):
    out = tmp_path / "student.pth"
    assert export.main(["--checkpoint", str(run / "checkpoint-best.pth"), "--out", str(out)]) == 0
    model, settings, classes = load_trained(out)
    assert settings == RUN and classes[3] == "class_3"
    assert out.stat().st_size < 1.2 * 4 * model.num_parameters + 50_000


@pytest.mark.parametrize("words, sentence", [
    ("--out x.pth", "give either --checkpoint"),
    ("--out x.pth --model resnet18", "give either"),
    ("--out x.pth --model resnet18 --weights random", "has nothing to export"),
    ("--out x.pth --checkpoint nowhere.pth", "no such file: nowhere.pth"),
    ("--out x.pth --checkpoint run", "is not a readable"),
    ("--out x.pth --format onnx --checkpoint a.pth", "a file of --format onnx ends in .onnx"),
    ("--out none/x.pth --checkpoint a.pth", "in a folder that does"),
    ("--out y.pth --checkpoint a.pth", "would be overwritten"),
    ("--out x.pth --dynamic-size --checkpoint a.pth", "--dynamic-size has no effect"),
    ("--out x.pth --checkpoint run/checkpoint-best.pth --data-set imagefolder", "--data-path")])
def test_bad_input_gets_a_sentence(words, sentence, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "y.pth.md").write_text("notes")
    assert export.main(words.split()) == 2
    err = capsys.readouterr().err
    assert sentence in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "x.pth").exists()


def test_published_weights_keep_their_resizing(tmp_path):
    """A short side of 232 px, which the settings of a run can only say as a share."""
    torch.manual_seed(0)
    model = create_model("resnet18", 10)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    model.input_resize, model.input_filter = 232, "bilinear"
    student = export.prepare(export.Trained(model, {}, None), ["resnet18"], None, False)
    how = export.Trained(model, student.settings, None).preprocessing()
    assert export.data.describe_eval(export.data.eval_transform(**how)) == (
        "short side to 232 px (bilinear), then the centre")
    load_weights(model, tmp_path / "a.pth")
