"""How a student is written for other programs, one format after the other: writing, reading back
for a comparison, and the lines that load it."""
import copy
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analysis import counterparts
from models.base import VisionModel
from models.weights import load_named, load_trained
from utils.checkpoint import save_atomically
from utils.files import write_atomically
from utils.registry import UserError, one_line

Forward = Callable[[Tensor], Tensor]  # images (N, 3, H, W) -> logits (N, num_classes)


class Student(NamedTuple):
    """What is written."""

    spec: list[str]  # NAME key=value ...
    model: VisionModel  # in evaluation mode, not folded
    settings: dict[str, Any]  # of its run, or what is known without one
    classes: list[str] | None  # names by label
    input_size: int  # pixels
    dynamic_size: bool = False  # whether programs may give images of other sizes


class Format(NamedTuple):
    ending: str  # of the file's name
    write: Callable[[Student, Path], None]
    read: Callable[[Student, Path], Forward | None]  # None where a package for it is missing
    usage: Callable[[Student, str], str]  # lines of Python that give logits, with the file's name
    place: str = "anywhere"  # where these run


def _blank(student: Student) -> str:
    return f"torch.zeros(1, 3, {student.input_size}, {student.input_size})"


# Files of this project


def write_weights(student: Student, path: Path) -> None:
    save_atomically({"model": student.model.state_dict(), "args": student.settings,
                     **({"classes": student.classes} if student.classes else {})}, path)


def use_weights(student: Student, name: str) -> str:
    return (f'from PIL import Image\nfrom predict import distilled\nstudent = distilled("{name}")\n'
            f'image = Image.new("RGB", (300, 200))  # yours: Image.open(...)\n'
            f'print(student.predict(image))')


def write_safetensors(student: Student, path: Path) -> None:
    try:
        from safetensors.torch import save
    except ImportError:
        raise UserError("--format safetensors needs the package safetensors: pip install "
                        "safetensors.") from None
    state = {name: value.contiguous() for name, value in student.model.state_dict().items()}
    content = save(state, {"format": "pt", **described(student)})
    write_atomically(lambda file: file.write(content), path)


def write_convnext(student: Student, path: Path) -> None:
    """As published files of the original ConvNeXt have it."""
    save_atomically({"model": convnext_of(student).state_dict(),
                     **({"classes": student.classes} if student.classes else {})}, path)


def convnext_of(student: Student) -> VisionModel:
    if not hasattr(student.model, "convnext_state"):
        raise UserError(f"{type(student.model).__name__} is no ConvNeXt with BatchNorm, which "
                        "--format convnext writes as an original one. Use --format weights.")
    return counterparts.original_convnext(student.model)


def convnext_spec(student: Student) -> list[str]:
    model = student.model
    spec = ["convnext_t", f"depths={','.join(map(str, model.depths))}",
            f"dims={','.join(str(info.channels) for info in model.feature_info)}"]
    if not any(name.endswith(".gamma") for name in model.state_dict()):
        spec.append("layer_scale_init=0")
    return spec


def _named(spec_of: Callable[[Student], list[str]]) -> dict[str, Callable]:
    """Reading and usage of a file that does not say which network it is of."""
    def read(student: Student, path: Path) -> Forward:
        return load_named(spec_of(student), str(path), None, student.model.num_classes).eval()

    def use(student: Student, name: str) -> str:
        return (f"import torch\nfrom models.weights import load_named\n"
                f'student = load_named({spec_of(student)}, "{name}", None, '
                f"{student.model.num_classes}).eval()\nimages = {_blank(student)}\n"
                "print(student(images))")

    return {"read": read, "usage": use}


# Graphs, without this project's code


def described(student: Student) -> dict[str, str]:
    """What a file without a network's code should say about it."""
    model = student.model
    return {"model": " ".join(student.spec), "classes": json.dumps(student.classes),
            "input_size": str(student.input_size), "input_mean": json.dumps(model.input_mean),
            "input_std": json.dumps(model.input_std)}


def graph_of(student: Student) -> torch.export.ExportedProgram:
    """The folded network, for any number of images; large kernels are plain convolutions in it."""
    model = copy.deepcopy(student.model).fold()
    images = torch.zeros(3, 3, student.input_size, student.input_size)  # 0 and 1 are special
    dynamic: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if student.dynamic_size:
        dynamic |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, (images,), dynamic_shapes=(dynamic,), strict=False)
    except Exception as error:  # whatever a network does that cannot be recorded
        raise UserError(f"{' '.join(student.spec)} cannot be recorded by torch.export"
                        f"{' for images of any size' if student.dynamic_size else ''}: "
                        f"{one_line(error)[:200]}.") from error


def write_torch_export(student: Student, path: Path) -> None:
    file = io.BytesIO()
    torch.export.save(graph_of(student), file,
                      extra_files={"student.json": json.dumps(described(student))})
    write_atomically(lambda whole: whole.write(file.getbuffer()), path)


def read_torch_export(student: Student, path: Path) -> Forward:
    return torch.export.load(str(path)).module()


def use_torch_export(student: Student, name: str) -> str:
    return (f'import torch\nstudent = torch.export.load("{name}").module()\n'
            f"images = {_blank(student)}\nprint(student(images))")


def write_onnx(student: Student, path: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx needs a package ({one_line(error)}): pip install onnx "
                        "onnxscript onnxruntime.") from None
    graph = graph_of(student)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(graph, dynamo=True, input_names=["images"],
                                    output_names=["logits"], verbose=False)
    program.model.metadata_props.update(described(student))
    content = program.model_proto.SerializeToString()
    write_atomically(lambda file: file.write(content), path)


def read_onnx(student: Student, path: Path) -> Forward | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def use_onnx(student: Student, name: str) -> str:
    size = student.input_size
    return (f"import numpy as np\nimport onnxruntime\n"
            f'student = onnxruntime.InferenceSession("{name}")\n'
            f"images = np.zeros((1, 3, {size}, {size}), np.float32)\n"
            'print(student.run(None, {"images": images}))')


# Networks of libraries


def _library(library: str) -> Format:
    def find(student: Student) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
        return counterparts.counterpart(library, student.spec, student.model, student.input_size)

    def write(student: Student, path: Path) -> None:
        state = find(student)[2]
        write_atomically(lambda file: torch.save(state, file), path)

    def read(student: Student, path: Path) -> Forward:
        name, options, _ = find(student)
        network = counterparts.build(library, name, options, student.model.num_classes)
        network.load_state_dict(torch.load(path, weights_only=True))
        return network

    def use(student: Student, name: str) -> str:
        there, options, _ = find(student)
        call = {"timm": "timm.create_model", "torchvision": "torchvision.models.get_model"}[library]
        words = ", ".join([repr(there), f"num_classes={student.model.num_classes}",
                           *(f"{key}={value!r}" for key, value in options.items())])
        return (f"import torch, {library}\nstudent = {call}({words}).eval()\n"
                f'student.load_state_dict(torch.load("{name}", weights_only=True))\n'
                f"images = {_blank(student)}\nprint(student(images))")

    return Format(".pth", write, read, use)


HERE = "in this repository, or anywhere after `pip install -e` of it"
FORMATS = {
    "weights": Format(".pth", write_weights,
                      lambda student, path: load_trained(path).model.eval(), use_weights, HERE),
    "safetensors": Format(".safetensors", write_safetensors,
                          **_named(lambda student: student.spec), place=HERE),
    "torch-export": Format(".pt2", write_torch_export, read_torch_export, use_torch_export),
    "onnx": Format(".onnx", write_onnx, read_onnx, use_onnx),
    "timm": _library("timm"),
    "torchvision": _library("torchvision"),
    "convnext": Format(".pth", write_convnext, **_named(convnext_spec), place=HERE),
}
