"""Weights: every layout of a file, what does not fit, what is no checkpoint, and addresses."""
import argparse
import datetime
import decimal
import json
import pickle
import re
import urllib.error
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from models import create_model, list_models
from models.base import IMAGENET_MEAN
from models.distiller import FrozenTeacher
from models.published import PUBLISHED, local_file, published_source
from models.state_dicts import describe_difference
from models.weights import (
    load_named,
    load_student,
    load_teacher,
    load_trained,
    load_weights,
    read_weights,
)
from tests.helpers import fill_by_name
from utils.classes import imagenet_wnids
from utils.registry import UserError

SPEC = ["resnet_nano", "dims=4,8,8,8"]
WNIDS = imagenet_wnids()

TORCHVISION_NAMES = {"resnet18": "resnet18", "resnet34": "resnet34", "resnet50": "resnet50",
                     "resnet101": "resnet101", "swin_t": "swin_t", "vit_b": "vit_b_16"}
# The name in the cache; a share's address ends in /download, so its token is taken.
CACHE_NAMES = {
    "slak_t": "1Iut2f5FMS_77jGPYoUJDQzDIXOsax1u4.pth",
    "slak_s": "1etM6KQbnlsgDAZ37adsQJ3UI8Bbv2AVe.pth",
    "slak_b": "1duUxUD3RSblQ6eDHd0n-u0aulwGypf1j.pth",
    "convnext_t_bn": "cR6KLvxjlUshUQA.pth",
    "convnext_s_bn": "PYqL3rVff3Nu2sP.pth",
    "convnext_t": "convnext_tiny_1k_224_ema.pth",
    "resnet50": "resnet50-11ad3fa6.pth",
}


def make_model(seed: int = 0, num_classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("resnet_nano", num_classes, depths=(1, 1, 1, 1), dims=(4, 8, 8, 8))


def make_state(seed: int = 1, num_classes: int = 10) -> dict[str, Tensor]:
    return fill_by_name(make_model(num_classes=num_classes), salt=seed).state_dict()


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def read_state_dict(path: Path, key: str | None = None) -> dict[str, Tensor]:
    return read_weights(path, key).state


def save(content: object, folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(content, path)
    return path


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


# Layouts


LAYOUTS = {
    "ours": lambda state: {"model": state, "args": {"student": "resnet_nano", "lr": 0.004},
                           "epoch": 3, "best_acc1": 71.5, "losses": {}},
    "published SLaK": lambda state: {
        "model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.004}]}, "epoch": 299,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="SLaK_tiny", lr=4e-3, kernel_size=["51", "5"], data=None),
        "model_ema": make_state(seed=2)},
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "arch": "resnet"},
    "module.": lambda state: prefixed("module.", state),
    "student.": lambda state: {"model": prefixed("student.", state)},
    "module.student.": lambda state: {"model": prefixed("module.student.", state)},
    "backbone.": lambda state: {"state_dict": prefixed("backbone.", state)},
    "with numbers beside the tensors": lambda state: {**state, "epoch": 3},
    "compiled": lambda state: {"model": prefixed("_orig_mod.", state)},
    "compiled in DDP": lambda state: {"model": prefixed("module._orig_mod.", state)},
    "DDP compiled": lambda state: prefixed("_orig_mod.module.", state),
    "mmpretrain": lambda state: {"meta": {"epoch": 3}, "state_dict": {
        ("head." if name.startswith("fc.") else "backbone.") + name: value
        for name, value in state.items()}},
    "a head without the prefix": lambda state: {
        ("" if name.startswith("fc.") else "net.") + name: value for name, value in state.items()},
    "averaged": lambda state: {"n_averaged": torch.tensor(7), **prefixed("module.", state)},
    "tutorial": lambda state: {"model_state_dict": state, "epoch": 3, "loss": torch.tensor(0.1)},
    "deepspeed": lambda state: {"module": state, "lr_scheduler": {}, "optimizer": {
        "state": {0: {"exp_avg": torch.ones(3)}}}},
    "net": lambda state: {"net": state, "acc": 81.0, "rng": {"torch": torch.get_rng_state()}},
    "dicts in dicts": lambda state: {"checkpoint": {"net": state, "epoch": 3}, "version": 1},
    "in half precision": lambda state: {
        name: value.half() if value.is_floating_point() else value
        for name, value in state.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads(layout, tmp_path):
    model, expected = make_model(), make_state()
    if layout == "in half precision":
        expected = {name: value.half().to(value.dtype) for name, value in expected.items()}
    load_weights(model, save(LAYOUTS[layout](expected), tmp_path))
    assert_same(model.state_dict(), expected)


def test_of_several_containers_one_is_asked_for(tmp_path):
    first, second = make_state(seed=1), make_state(seed=2)
    path = save({"student": first, "teacher": {"net": second}, "ema": second}, tmp_path)
    with pytest.raises(UserError, match="holds several state dicts: student, ema. Choose one with "
                                        "--teacher-weights-key"):
        load_teacher(SPEC, str(path), None, [str(i) for i in range(10)])
    assert_same(read_state_dict(path, "ema"), second)


def test_prefixes_leave_a_file_that_fits_better_as_it_is(tmp_path):
    """A name that is missing is missing, whatever else the names have in common."""
    state = prefixed("a.b.", make_state())
    state.pop("a.b.fc.bias")
    with pytest.raises(UserError, match=r"fit ResNet: 1 missing \(fc.bias\)\. Check"):
        load_weights(make_model(), save(state, tmp_path))


# Beside the tensors


class Settings:
    """A class of another program."""


def harmless() -> dict[str, object]:
    return {"scalar": np.float64(71.2), "int": np.int64(3), "array": np.ones((2, 2), np.float32),
            "words": np.array(["a"]), "dtype": np.dtype("f4"), "path": Path("a/b"),
            "date": datetime.datetime(2024, 1, 1), "span": datetime.timedelta(3),
            "ordered": OrderedDict(a=1), "default": defaultdict(list, a=[1]),
            "deque": deque([1, 2], maxlen=3), "args": argparse.Namespace(lr=0.1, out=Path("x")),
            "space": SimpleNamespace(a=1), "kind": int, "version": torch.__version__,
            "number": decimal.Decimal("0.1"), "set": {1, 2}, "frozen": frozenset({1}),
            "complex": 1j, "range": range(3), "device": torch.device("cpu")}


@pytest.mark.parametrize("legacy", [False, True])
def test_what_holds_no_code_may_stand_beside_the_weights(legacy, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": make_state(), **harmless()}, path,
               _use_new_zipfile_serialization=not legacy)
    model = make_model()
    load_weights(model, path)
    assert_same(model.state_dict(), make_state())


def test_names_of_a_file_are_printable_in_a_sentence(tmp_path):
    odd = {"a\nb\ud800": torch.ones(2), "x" * 9999: torch.ones(2)}
    for content in ({**make_state(), **odd}, {"a\nb": odd, "c\nd": odd},
                    {**make_state(), "x\n": torch.ones(2).to_sparse()}):
        with pytest.raises(UserError) as caught:
            load_weights(make_model(), save(content, tmp_path))
        assert str(caught.value).isprintable() and len(str(caught.value)) < 900


def test_a_refusal_names_what_it_refuses(tmp_path):
    path = save({"model": make_state(), "settings": Settings()}, tmp_path)
    with pytest.raises(UserError, match=r"it holds .*test_weights.Settings, and no code is run "
                                        "to read a file. Save its state dict alone"):
        load_weights(make_model(), path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("content, telling", [
    (b"", "the file is empty"), (b"\n<!DOCTYPE html>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    (b'\x40\0\0\0\0\0\0\0{"a":', "a .safetensors file; give it that ending"),
    (pickle.dumps({"model": [1.0]}), "was not written by torch.save")])
def test_what_people_take_for_a_checkpoint_is_named(content, telling, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=telling) as caught:
        load_weights(make_model(), path)
    assert "code are not" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_text_path_loads(tmp_path):
    model = make_model()
    load_weights(model, str(save({"model": make_state()}, tmp_path)))
    assert_same(model.state_dict(), make_state())


def test_key_chooses_the_container(tmp_path):
    plain, averaged = make_state(seed=1), make_state(seed=2)
    path = save({"model_ema": averaged, "model": plain}, tmp_path)
    model = make_model()
    for key, expected in ((None, plain), ("model", plain), ("model_ema", averaged)):
        load_weights(model, path, key=key)
        assert_same(model.state_dict(), expected)


def test_an_average_alone_is_taken(tmp_path):
    assert_same(read_state_dict(save({"model_ema": make_state(), "epoch": 1}, tmp_path)),
                make_state())


@pytest.mark.parametrize("content, has", [
    ({"model": {"w": torch.ones(1)}, "state_dict": {"w": torch.ones(1)}}, "model, state_dict"),
    ({"w": torch.ones(1)}, "a bare state dict")])
def test_a_key_that_is_not_there(content, has, tmp_path):
    path = save(content, tmp_path)
    with pytest.raises(UserError, match=f"no weights under 'model_ema'; it has {has}"):
        read_state_dict(path, key="model_ema")


def test_a_prefix_of_some_names_only_is_a_name(tmp_path):
    state = {"module.w": torch.ones(1), "w": torch.zeros(1)}
    assert_same(read_state_dict(save(state, tmp_path)), state)


def test_a_file_without_weights(tmp_path):
    path = save({"epoch": 3, "args": {"lr": 0.1}}, tmp_path)
    with pytest.raises(UserError, match="holds no weights.*got the keys epoch, args"):
        read_state_dict(path)


# What does not fit


def test_difference_in_sentences():
    wanted = {name: torch.zeros(2) for name in "abcdefg"}
    assert describe_difference(wanted, wanted) == ""
    got = {"a": torch.zeros(2), "b": torch.zeros(3, 1), "x": torch.zeros(1)}
    assert describe_difference(got, wanted) == (
        "5 missing (c, d, e, f and 1 more). 1 unexpected (x). "
        "1 of another shape (b (3, 1) instead of (2,)).")


def change(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    if what == "missing":
        state.pop("fc.bias")
    elif what == "unexpected":
        state["fc.scale"] = torch.ones(3)
    elif what == "shape":
        state["conv1.weight"] = torch.ones(4, 3, 3, 3)
    elif what == "classes":
        state = make_state(num_classes=7)
    elif what == "variance":
        state["bn1.running_var"] = -torch.ones(4)
    elif what in ("NaN", "infinite"):
        state["bn1.weight"] = torch.full((4,), 1e300 if what == "infinite" else torch.nan,
                                         dtype=torch.float64)
    else:
        odd = {"whole numbers": torch.Tensor.long, "sparse": torch.Tensor.to_sparse,
               "complex": lambda value: value.to(torch.complex64),
               "meta": lambda value: value.to("meta"),
               "expanded": lambda value: torch.ones(1, 1, 1, 1).expand(value.shape),
               "quantized": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.quint8)}
        state["conv1.weight"] = odd[what](state["conv1.weight"])
    return state


@pytest.mark.parametrize("what, sentence", [
    ("missing", r"1 missing \(fc.bias\)\."),
    ("unexpected", r"1 unexpected \(fc.scale\)\."),
    ("shape", r"1 of another shape \(conv1.weight \(4, 3, 3, 3\) instead of \(4, 3, 7, 7\)\)\."),
    ("classes", r"2 of another shape \(fc.weight \(7, 8\) instead of \(10, 8\), fc.bias \(7,\) "
                r"instead of \(10,\)\)\. The file is for 7 classes, the model has 10"),
    ("NaN", r"holds weights that are NaN or infinite, in 1 of 62 tensors \(bn1.weight\)"),
    ("infinite", r"NaN or infinite, in 1 of 62 tensors \(bn1.weight\)"),
    ("variance", "is damaged: bn1.running_var holds variances below zero"),
    ("whole numbers", r"conv1.weight holds torch.int64 and should hold torch.float32\."),
    ("complex", r"conv1.weight is a tensor of torch.complex64. Weights are dense tensors"),
    ("sparse", "conv1.weight is a nested or sparse tensor"),
    ("meta", "conv1.weight is a tensor without values"),
    ("quantized", "conv1.weight is a tensor of torch.quint8"),
    ("expanded", "conv1.weight is a view of fewer values than it shows"),
])
def test_what_does_not_fit_is_refused_and_changes_nothing(what, sentence, tmp_path):
    path = save({"model": change(make_state(), what)}, tmp_path)
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=sentence) as caught:
        load_weights(model, path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert_same(model.state_dict(), before)


# What is no checkpoint


@pytest.mark.parametrize("legacy", [True, False])
def test_a_truncated_file(legacy, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": make_state()}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    for size in (len(content) // 2, len(content) - 100, 30, 0):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=f"{re.escape(str(path))} is not a .*PyTorch"):
            load_weights(make_model(), path)


@pytest.mark.parametrize("content", [
    b"epoch 3, top-1 71.5\n", b"<!DOCTYPE html><html>Too many users\n", b"{\"model\": []}\n",
    b"a\n", b"\x80\x02", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(range(256)), b"(lp0\n.", b"0.",
    b"hello\n", b"test\n", b"PK\x03\x04 not a zip", b"version https://git-lfs.github.com/spec/v1\n",
])
def test_a_file_that_is_something_else(content, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_weights(make_model(), path)


class RunsCode:
    """A pickle that creates a file when it is loaded the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", ["torch", "legacy torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_without_running_it(writer, tmp_path):
    path, marker = tmp_path / "weights.pth", tmp_path / "ran"
    content = {"model": make_state(), "args": RunsCode(marker)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content["args"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(UserError, match="is not a .*PyTorch checkpoint"):
        load_weights(make_model(), path)
    assert not marker.exists()
    with open(path, "rb") as file:  # the ordinary way does run it, so the test means something
        pickle.load(file) if writer == "pickle" else torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("content, kind", [([torch.ones(2)], "list"), (torch.ones(2), "Tensor")])
def test_a_file_that_holds_no_dict(content, kind, tmp_path):
    path = save(content, tmp_path)
    with pytest.raises(UserError, match=f"holds a {kind}, expected a dict of tensors"):
        load_weights(make_model(), path)


def test_a_dict_with_other_keys_than_names(tmp_path):
    for content in ({0: torch.ones(2), 1: torch.ones(2)}, {0: 1}):
        with pytest.raises(UserError):
            load_weights(make_model(), save(content, tmp_path))


def test_no_such_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match="no such file: .*nothing.pth"):
        load_weights(make_model(), tmp_path / "nothing.pth")
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        load_weights(make_model(), tmp_path)


# Computed buffers


@pytest.mark.parametrize("change_computed", ["removed", "of the official code", "of another value"])
def test_computed_buffers_are_ignored_and_not_required(change_computed, tmp_path):
    model = create_model("swin_nano", 10)
    computed = {name: value.clone() for name, value in model.state_dict().items()
                if name.endswith("relative_position_index")}
    state = fill_by_name(create_model("swin_nano", 10), salt=1).state_dict()
    learned = {name: value for name, value in state.items() if name not in computed}
    assert computed
    others = {"removed": {}, "of another value": {name: value + 1 for name, value in state.items()
                                                  if name in computed},
              "of the official code": {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
                                       "layers.0.attn.relative_position_index": torch.ones(49, 49)}}
    load_weights(model, save({"model": {**learned, **others[change_computed]}}, tmp_path))
    assert_same(model.state_dict(), {name: computed.get(name, value)
                                     for name, value in state.items()})


# Addresses


@pytest.mark.parametrize("name", [name for name in TORCHVISION_NAMES if name != "vit_b"])
def test_published_addresses_are_torchvisions_own(name):
    weights = torchvision.models.get_model_weights(TORCHVISION_NAMES[name]).DEFAULT
    assert published_source(name) == weights.url
    assert PUBLISHED[name].top1 == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]


def test_published_names_are_registered():
    assert set(PUBLISHED) <= set(list_models())
    assert len({source.url for source in PUBLISHED.values()}) == len(PUBLISHED)
    with pytest.raises(UserError, match="'slak_nano' .known: slak_t, .*the word random"):
        published_source("slak_nano")


class Downloads:
    """Stands in for torch.hub.download_url_to_file: notes each call and writes `content`."""

    def __init__(self, content: object = None, error: Exception | None = None) -> None:
        self.content, self.error, self.calls = content, error, []

    def __call__(self, url: str, dst: str, hash_prefix: str | None = None, **_) -> None:
        self.calls.append((url, Path(dst), hash_prefix))
        if self.error is not None:
            raise self.error
        torch.save(self.content, dst)


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """serve(...) puts a Downloads in place of the network; the cache is tmp_path."""
    def install(*args, **kwargs) -> Downloads:
        downloads = Downloads(*args, **kwargs)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        monkeypatch.setattr(torch.hub, "download_url_to_file", downloads)
        return downloads
    return install


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_name_in_the_cache(name, serve, tmp_path):
    downloads = serve({})
    path = local_file(published_source(name))
    assert path == tmp_path / "hub" / "checkpoints" / CACHE_NAMES[name]
    assert [(url, dst) for url, dst, _ in downloads.calls] == [(PUBLISHED[name].url, path)]


def test_every_published_file_has_its_own_name(serve):
    serve({})
    names = [local_file(published.url).name for published in PUBLISHED.values()]
    assert len(set(names)) == len(names) and all(name.endswith(".pth") for name in names)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_hash_in_a_name_is_checked_where_it_is_one(name, serve):
    downloads = serve({})
    local_file(PUBLISHED[name].url)
    expected = None
    if PUBLISHED[name].url.startswith("https://download.pytorch.org") or name == "deit_s":
        expected = PUBLISHED[name].url.rpartition("-")[2].removesuffix(".pth")
        assert len(expected) == 8
    assert [hash_prefix for _, _, hash_prefix in downloads.calls] == [expected]


def test_the_epoch_in_a_checkpoints_name_is_no_hash(serve):
    downloads = serve({})
    local_file("https://example.org/run/checkpoint-299.pth")
    assert downloads.calls[0][2] is None


def test_two_addresses_do_not_share_a_file(serve):
    """Every run writes a checkpoint-best.pth."""
    serve({})
    paths = {local_file(f"https://example.org/run{i}/checkpoint-best.pth") for i in range(2)}
    assert len(paths) == 2


def test_an_address_is_downloaded_once_and_loads(serve):
    downloads = serve({"model": make_state()})
    for _ in range(2):
        model = make_model()
        load_weights(model, "https://example.org/weights.pth")
        assert_same(model.state_dict(), make_state())
    assert len(downloads.calls) == 1


@pytest.mark.parametrize("error", [
    urllib.error.URLError("Name or service not known"), TimeoutError("timed out"),
    urllib.error.HTTPError("https://example.org", 404, "Not Found", None, None),
    RuntimeError('invalid hash value (expected "11ad3fa6", got "e3b0c442")')])
def test_offline_tells_how_to_fetch_by_hand(error, serve, tmp_path):
    serve(error=error)
    with pytest.raises(UserError) as caught:
        load_weights(make_model(), published_source("resnet50"))
    message = str(caught.value)
    assert PUBLISHED["resnet50"].url in message and str(error) in message
    path = tmp_path / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth"
    assert "Fetch it by hand" in message and str(path) in message
    assert not path.exists()
    torch.save(make_state(), path)  # what the message says
    load_weights(make_model(), published_source("resnet50"))


def test_a_path_is_itself_and_downloads_nothing(serve, tmp_path):
    downloads = serve({})
    assert local_file(tmp_path / "a.pth") == tmp_path / "a.pth"
    assert local_file("some/download") == Path("some/download")
    assert downloads.calls == []


def test_the_best_average_is_read_as_the_average(tmp_path, capsys):
    raw, average = create_model("resnet_nano", 10), create_model("resnet_nano", 10)
    content = {"model": raw.state_dict(), "model_ema": average.state_dict()}
    expected = {"checkpoint-best.pth": raw, "checkpoint-best-ema.pth": average}
    for name, network in expected.items():
        torch.save(content, tmp_path / name)
        model = create_model("resnet_nano", 10)
        load_weights(model, tmp_path / name)
        assert torch.equal(model.fc.weight, network.fc.weight)
        assert name in capsys.readouterr().out
    load_weights(model, tmp_path / "checkpoint-best-ema.pth", "model")
    assert torch.equal(model.fc.weight, raw.fc.weight)


def test_a_teacher_may_have_its_average_taken(tmp_path):
    raw, average = create_model("resnet_nano", 10), create_model("resnet_nano", 10)
    path, classes = str(tmp_path / "t.pth"), [str(label) for label in range(10)]
    torch.save({"model": raw.state_dict(), "model_ema": average.state_dict()}, path)
    model = load_teacher(["resnet_nano"], path, "model_ema", classes)
    assert torch.equal(model.fc.weight, average.fc.weight)
    with pytest.raises(UserError, match="--teacher-weights: .*no weights under 'ema'.*model_ema"):
        load_teacher(["resnet_nano"], path, "ema", classes)


# Classes by their names


def save_classes(folder: Path, classes: list[str] | None, number: int = 0, **beside) -> str:
    """A file of this many classes, row k of whose classifier is full of k."""
    number = number or len(classes)
    state = make_state(num_classes=number)
    state["fc.weight"] = torch.arange(number).float()[:, None].expand(number, 8).contiguous()
    state["fc.bias"] = torch.arange(number).float()
    named = {} if classes is None else {"classes": classes}
    return str(save({"model": state, **named, **beside}, folder))


def rows(model: nn.Module) -> list[int]:
    assert torch.equal(model.fc.weight[:, 0], model.fc.bias)
    return model.fc.bias.int().tolist()


WORDS = ["ant", "bee", "cat"]
# classes of the file (None: it names none), their number, those of the data, rows that are kept
TEACHERS = {
    "equal": (WORDS, 3, WORDS, [0, 1, 2], ""),
    "in another order": (WORDS, 3, ["cat", "ant", "bee"], [2, 0, 1], "put into the data's order"),
    "cut": (WORDS, 3, ["cat", "ant"], [2, 0], "of its 3 classes the data's 2 are kept"),
    "numbers in order of words": (["0", "1", "10", "2"], 4, ["0", "1", "2", "10"], [0, 1, 3, 2],
                                  "put into the data's order"),
    "ImageNet's": (None, 1000, WNIDS, list(range(1000)), ""),
    "of ImageNet": (None, 1000, [WNIDS[7], WNIDS[0]], [7, 0], "data's 2 are kept"),
    "ImageNet's by label": (None, 1000, [*map(str, range(1000))], list(range(1000)), "class k"),
    "by place": (None, 3, ["x", "y", "z"], [0, 1, 2], "do not name their classes"),
    "others": (WORDS, 3, ["ant", "bee", "dog"], None, "1 of the data's 3 are not among them: dog"),
    "no synsets": (None, 1000, WORDS, None, "does not name them .* by folders of its wnids"),
    "a part of unnamed ones": (None, 4, WORDS, None, "has 4 classes and does not name them"),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_a_teachers_classes_are_matched_by_name(case, tmp_path, capsys):
    theirs, number, ours, kept, said = TEACHERS[case]
    path = save_classes(tmp_path, theirs, number)
    if kept is not None:
        teacher = load_teacher(SPEC, path, None, ours)
        assert rows(teacher) == kept and teacher.classes == ours
        assert teacher.fc.out_features == teacher.num_classes == len(ours)
        shown = capsys.readouterr().out
        assert said in shown and ("teacher:" in shown) == bool(said)
        return
    with pytest.raises(UserError, match=said) as caught:
        load_teacher(SPEC, path, None, ours)
    assert f"--teacher none --student {' '.join(SPEC)} --student-weights" in str(caught.value)
    teacher = load_teacher(SPEC, path, None, ours, needs_logits=False)
    assert teacher.num_classes == 0 and "feature maps alone teach" in capsys.readouterr().out
    assert FrozenTeacher(teacher, (0,) * 3, (1,) * 3)(torch.zeros(1, 3, 32, 32)) is None


def test_a_student_takes_rows_by_name_or_starts_its_classifier_anew(tmp_path, capsys):
    def start(*args) -> nn.Module:
        torch.manual_seed(3)
        return load_student(SPEC, *args)

    path = save_classes(tmp_path, WORDS)
    assert rows(start(path, None, WORDS)) == [0, 1, 2]
    assert "student:" not in capsys.readouterr().out
    assert rows(start(path, None, ["bee", "ant", "cat"])) == [1, 0, 2]
    assert "put into the data's order, matched by name (bee was class 1)" in capsys.readouterr().out
    for ours in (["ant", "bee"], ["ant", "bee", "dog"], [*WORDS, "dog"]):
        student, fresh = start(path, None, ours), start("random", None, ours)
        assert torch.equal(student.fc.weight, fresh.fc.weight) and student.num_classes == len(ours)
        assert torch.equal(student.conv1.weight, make_state(num_classes=3)["conv1.weight"])
        assert (f"its classifier starts anew for the data's {len(ours)} classes"
                in capsys.readouterr().out)
    without = make_state(num_classes=3)
    del without["fc.weight"], without["fc.bias"]
    start(str(save(without, tmp_path)), None, WORDS)
    assert "weights.pth are none" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"one class only \(ant\)"):
        start("random", None, ["ant"])


@pytest.mark.parametrize("name", list_models())
def test_every_network_says_where_its_classes_are(name, tmp_path):
    if not name.endswith(("nano", "pico")):
        with torch.device("meta"):
            model = create_model(name, 5)
        assert {len(model.get_submodule(layer).weight) for layer in model.classifiers} == {5}
        return
    model = fill_by_name(create_model(name, 5)).eval()
    images = torch.randn(1, 3, model.input_size, model.input_size)
    with torch.no_grad():
        expected = model(images)[:, [3, 0]]
        cut = model.keep_classes([3, 0])
        assert torch.allclose(cut(images), expected, atol=1e-6) and cut.num_classes == 2


def test_a_file_that_contradicts_itself(tmp_path):
    path = save_classes(tmp_path, WORDS, number=4)
    with pytest.raises(UserError, match="names 3 classes, and its classifier has 4"):
        load_teacher(SPEC, path, None, WORDS)


# What the weights expect


@pytest.mark.parametrize("there, here, other", [
    (["vit_nano", "input_norm=half"], ["vit_nano"], "input_norm"),
    (["vit_nano"], ["vit_nano", "num_heads=6"], "num_heads"),
    (["vit_nano", "input_mean=0.5"], ["vit_nano"], "input_mean"),
    (["vit_nano", "image_size=224"], ["vit_nano"], None)])
def test_another_network_of_the_same_shapes(there, here, other, tmp_path):
    path = str(save({"model": create_model("vit_nano", 3).state_dict(),
                     "args": {"student": there, "num_classes": 3}}, tmp_path))
    if other is None:
        load_named(here, path, None, 3)
        return
    with pytest.raises(UserError, match=f"was trained as `{' '.join(there)}`, which has another "
                                        f"{other} than"):
        load_named(here, path, None, 3)
    model = load_trained(Path(path)).model
    assert model.input_mean == ((0.5,) * 3 if "input" in " ".join(there) else IMAGENET_MEAN)


def test_normalisation_is_an_option_of_every_network(tmp_path, capsys):
    model = create_model("resnet_nano", 3, input_mean=0.5, input_std=(0.1, 0.2, 0.3))
    assert model.input_mean == (0.5, 0.5, 0.5) and model.input_std == (0.1, 0.2, 0.3)
    for wrong in (0, -1.0, (0.5, 0.5), "half", (1.0, 1.0, float("nan")), True):
        with pytest.raises(UserError, match="input_std must be a positive number, or three"):
            create_model("resnet_nano", 3, input_std=wrong)
    path = save_classes(tmp_path, None, 3)
    load_named(SPEC, path, None, 3)
    assert "normalised with input_mean=0.485,0.456,0.406 input_std=0" in capsys.readouterr().out


@pytest.mark.parametrize("config, content", [
    ("config.json", {"architecture": "vit", "pretrained_cfg": {"mean": [0.5] * 3,
                                                               "std": [0.5] * 3}}),
    ("preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})])
def test_the_normalisation_beside_a_file_is_read(config, content, tmp_path, capsys):
    path = tmp_path / "model.bin"
    torch.save(make_state(num_classes=3), path)
    (tmp_path / config).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{config} beside it says that it takes images normalised "
                                        "with input_mean=0.5,0.5,0.5 input_std=0.5,0.5,0.5, and"):
        load_named(SPEC, str(path), None, 3)
    load_named([*SPEC, "input_mean=0.5", "input_std=0.5,0.5,0.5"], str(path), None, 3)
    assert "are options of" not in capsys.readouterr().out
    (tmp_path / config).write_text("[" * 9999)
    load_named(SPEC, str(path), None, 3)
