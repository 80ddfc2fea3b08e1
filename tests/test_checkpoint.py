"""What a run folder holds after a kill at any moment, who may write into it, and what of a
checkpoint is believed."""
import copy
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_state

import engine
import train_kd
from models.base import create_model
from utils import checkpoint, files, lock
from utils.content import CHECKSUMS, Named, check_form, checksum, tensor_fault
from utils.log import Meter, RunLog
from utils.registry import UserError

BASE = ["--data-set", "outlines", "train_size=40", "val_size=8", "--input-size", "32",
        "--batch-size", "10", "--effective-batch", "10", "--warmup-epochs", "1", "--num-workers",
        "0", "--student", "slak_pico", "dims=8,16", "--teacher", "none", "--output-dir", "run"]
EPOCHS = ["--epochs", "2", "--model-ema", "--save-freq", "1", "--save-num", "1"]


def assert_same(left, right, where: str = "") -> None:
    """Bit for bit, through dicts and lists."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    elif isinstance(left, dict):
        assert list(left) == list(right), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for i, pair in enumerate(zip(left, right)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert left == right, where


@pytest.mark.parametrize("is_whole", [False, True])
def test_what_best_and_last_checkpoints_hold(tmp_path, is_whole):
    content = {"model": {"w": torch.ones(2)}, "optimizer": {"m": torch.ones(4)}, "epoch": 1,
               "args": {"seed": 0}}
    names = ["checkpoint-best.pth", checkpoint.LAST]
    checkpoint.save(content, tmp_path, names, keep=0, is_whole=is_whole)
    best, last = (checkpoint.load_file(tmp_path / name) for name in names)
    assert last.keys() == {*content, CHECKSUMS}
    assert best.keys() == last.keys() - (set() if is_whole else {"optimizer"})
    assert best[CHECKSUMS].keys() == best.keys() - {CHECKSUMS}


# A kill at any moment


class Killed(BaseException):
    """Nothing of the program runs after it."""


def train_quickly(state, *args, options: engine.StepOptions, **kwargs) -> dict[str, float]:
    """In place of an epoch: updates that are a function of the step."""
    steps_per_epoch = options.steps_per_epoch
    if state.step == state.epoch * steps_per_epoch:
        state.meter = Meter()
    while state.step < (state.epoch + 1) * steps_per_epoch:
        engine.set_hyperparameters(state.optimizer, 1e-3 / (state.step + 1), 0.05)
        torch.manual_seed(state.step)
        for parameter in state.distiller.parameters():
            parameter.grad = torch.randn_like(parameter)
        engine.optimizer_update(state, None)
        state.meter.add({"loss": torch.tensor(1 / state.step)}, state.step)
    return {**state.meter.means(), "images_per_second": None}


def evaluate_quickly(model, *args, **kwargs) -> engine.Evaluation:
    acc1 = abs(list(model.parameters())[-1].detach().sum().item()) % 100
    return engine.Evaluation(acc1, acc1, 1.0, None, 8, {})


def folder_content(folder: Path) -> dict[str, object]:
    """What of a run's files is to be the same after any kill."""
    content = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.pth")}
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    content["log.txt"] = [{key: value for key, value in record.items()
                           if key != "peak_memory_gib"} for record in log]
    content["args.yaml"] = (folder / "args.yaml").read_text()
    return content | {"names": sorted(path.name for path in folder.iterdir())}


def kill_at(patch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Before the numbered rename or deletion; their list. Until then what is written is a file
    beside the one that counts."""
    seen = []

    def counted(what, function, name_of):
        def call(*args, **kwargs):
            seen.append(f"{what} {name_of(*args)}")
            if len(seen) == number:
                raise Killed
            return function(*args, **kwargs)
        return call

    patch.setattr(files.os, "replace", counted("rename", os.replace, lambda _, new: new.name))
    patch.setattr(Path, "unlink", counted("delete", Path.unlink, lambda path: path.name))
    return seen


def test_after_a_kill_at_any_write_the_folder_is_as_if_there_was_none(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "train_one_epoch", train_quickly)
    monkeypatch.setattr(engine, "evaluate", evaluate_quickly)
    monkeypatch.setattr(checkpoint, "git_revision", lambda folder: "unknown")

    def run(name: str) -> int:
        os.makedirs(tmp_path / name, exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        return train_kd.main([*BASE, *EPOCHS])

    with monkeypatch.context() as patch:
        steps = kill_at(patch, 0)
        assert run("whole") == 0
    whole = folder_content(tmp_path / "whole" / "run")
    assert {"checkpoint-best.pth", "checkpoint-best-ema.pth", "checkpoint-1.pth",
            "checkpoint-last.pth", "log.txt", "args.yaml", "command.txt"} == set(whole["names"])
    assert len(steps) >= 12 and "delete checkpoint-0.pth" in steps
    for number, step in enumerate(steps, 1):
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            with pytest.raises(Killed):
                run("cut")
        assert run("cut") == 0
        assert_same(folder_content(tmp_path / "cut" / "run"), whole, f"after {step}")
        shutil.rmtree(tmp_path / "cut")


# Who may write into a folder


HOLDER = """
import sys, time, os
sys.path.insert(0, {root!r})
from pathlib import Path
from utils.lock import FolderLock
lock = FolderLock(Path("."), "checkpoint-last.pth")
lock.acquire("1 process(es), git unknown")
if os.fork() == 0:  # a worker, which outlives a kill of the process
    time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(lock.fcntl is None, reason="this system has no such locks")
def test_a_lock_says_who_holds_it_and_ends_with_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    code = HOLDER.format(root=str(Path(lock.__file__).parent.parent))
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE,
                              start_new_session=True)
    try:
        pid = holder.stdout.readline().strip().decode()
        mine = lock.FolderLock(tmp_path, "checkpoint-last.pth")
        for act in (mine.check, lambda: mine.acquire("1 process(es), git unknown")):
            with pytest.raises(UserError, match=f"in use by process {pid} on .*, started 2.* as "):
                act()
        assert len((tmp_path / "command.txt").read_text().splitlines()) == 1
        holder.kill()
        holder.wait()
        mine.check()
        mine.acquire("1 process(es), git unknown")
        mine.close()
    finally:
        os.killpg(holder.pid, 9)
    assert f"process {os.getpid()} on " in (tmp_path / "command.txt").read_text()


def test_a_run_that_went_on_meanwhile_is_not_overwritten(tmp_path):
    (tmp_path / "last").write_text("1")
    mine = lock.FolderLock(tmp_path, "last")
    (tmp_path / "last").write_text("23")
    with pytest.raises(UserError, match="another start has written .*last"):
        mine.acquire("")
    assert not (tmp_path / "command.txt").read_text()


@pytest.mark.skipif(lock.fcntl is None, reason="this system has no such locks")
def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def refuse(*args) -> None:
        raise OSError(number, os.strerror(number))

    settings, number = {"world_size": 1, "git": "unknown"}, errno.ENOLCK
    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    for _ in range(2):  # the second would find the folder in use
        checkpoint.start_run(checkpoint.lock_folder(tmp_path / "run", False), settings)
    number = errno.EIO  # another fault than that there are none
    with pytest.raises(UserError, match="could not lock .*command.txt: Input/output error"):
        checkpoint.lock_folder(tmp_path / "run", False)
    monkeypatch.setattr(lock, "fcntl", None)
    checkpoint.start_run(checkpoint.lock_folder(tmp_path / "run", False), settings)
    assert capsys.readouterr().out.count("no locks") == 3


def test_a_start_clears_what_killed_ones_left_and_nothing_else(tmp_path):
    left = ["checkpoint-last.pth.node-1.tmp", "log.txt.node-7.tmp", "checkpoint-2.pth.tmp"]
    for name in [*left, "notes.tmp", "checkpoint-last.pth"]:
        (tmp_path / name).touch()
    checkpoint.start_run(checkpoint.lock_folder(tmp_path, False), {"world_size": 1, "git": "x"})
    assert {path.name for path in tmp_path.iterdir()} == {
        "notes.tmp", "checkpoint-last.pth", "args.yaml", "command.txt"}


def test_numbered_checkpoints_of_later_epochs_stay(tmp_path):
    """As after --resume with an earlier one."""
    for name in ("1", "3", "5", "9", "11", "5-copy"):
        (tmp_path / f"checkpoint-{name}.pth").touch()
    checkpoint.keep_last(tmp_path, 2, epoch=5)
    assert sorted(path.stem[11:] for path in tmp_path.iterdir()) == ["11", "3", "5", "5-copy", "9"]


# What keeps a file from being written


@pytest.mark.parametrize("number, remedy", [
    ("ENOSPC", "Make room"), ("EDQUOT", "quota"), ("EROFS", "writable"), ("EACCES", "permission"),
    ("ENOENT", "put it back"), ("ENAMETOOLONG", "shorter"), ("EFBIG", "ulimit"),
    ("EINTR", "Mend that")])
def test_a_file_that_cannot_be_written_says_why_and_what_to_do(number, remedy, tmp_path,
                                                                monkeypatch):
    def fail(*args) -> None:
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    (tmp_path / "log.txt").write_text("before")
    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(UserError) as error:
        files.write_text_atomically("after", tmp_path / "log.txt")
    text = str(error.value)
    assert os.strerror(getattr(errno, number)) in text and remedy in text and "kept" in text
    assert ("Make room" in text) == (number == "ENOSPC") and "\n" not in text
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_pipe_is_written_to_and_not_replaced():
    """As /dev/stdout is, or /dev/null, which root could replace by a file."""
    reader, writer = os.pipe()
    files.write_text_atomically("a table", Path(f"/dev/fd/{writer}"))
    assert os.read(reader, 99) == b"a table"
    os.close(reader)
    os.close(writer)


def test_no_room_for_tensors_is_told_from_other_errors_of_torch(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no disk that is always full")

    def write(file) -> None:
        with open("/dev/full", "wb") as full:
            torch.save({"a": torch.zeros(100_000)}, full)

    with pytest.raises(UserError, match="No space left"):
        files.write_atomically(write, tmp_path / "a.pth")
    with pytest.raises(RuntimeError, match="other"):
        files.write_atomically(lambda file: (_ for _ in ()).throw(RuntimeError("other")),
                               tmp_path / "a.pth")


@pytest.mark.parametrize("path", [".", "", "folder"])
def test_a_folder_is_no_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="could not write .*: Is a directory"):
        files.write_text_atomically("text", Path(path))


@pytest.mark.parametrize("line", ["{", "[1]", '{"epoch": "1"}', '{"loss": 1}'])
def test_a_log_that_cannot_be_continued_is_left(line, tmp_path):
    (tmp_path / "log.txt").write_text(f'{{"epoch": 0}}\n{line}\n')
    with pytest.raises(UserError, match=r"line 2 of .*log\.txt"):
        RunLog(tmp_path, 3)


def test_a_log_has_each_epoch_once_and_says_what_it_lacks(tmp_path, capsys):
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n{"epoch": 2}\n{"epoch": 0}\n{"epoch": 4}\n')
    log = RunLog(tmp_path, 9)
    for epoch in (3, 4):
        log.write({"epoch": epoch, "train_loss": 1.0, "train_lr": 0.1, "images_per_second": None},
                  {}, step=0)
    found = [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert found == [0, 2, 3, 4]
    assert capsys.readouterr().out.count("lacks 1 of the 3 epochs before") == 1


# What of a file is believed


CONTENT = {"model": {"a": torch.arange(6.0).view(1, 2, 3, 1), "b": torch.tensor(True)},
           "step": 3, "best": -float("inf"), "list": ["x", (1, None, True)]}


def test_a_checksum_is_of_the_content_alone():
    like = copy.deepcopy(CONTENT)
    like["model"]["a"] = like["model"]["a"].to(memory_format=torch.channels_last).requires_grad_()
    assert checksum(like) == checksum(CONTENT)
    changes = [("a", torch.arange(6.0).view(2, 3)), ("a", CONTENT["model"]["a"].double()),
               ("a", CONTENT["model"]["a"].nextafter(torch.tensor(9.0))), ("b", torch.tensor(1)),
               ("b", True)]
    others = [{**CONTENT, "model": {**CONTENT["model"], name: value}} for name, value in changes]
    others += [{**CONTENT, "step": 3.0}, {**CONTENT, "step": 3 + 2 ** 64}, {**CONTENT, "more": 1},
               {**CONTENT, "list": ["x", [1, None, True]]},
               {**CONTENT, "list": ["x", (1, None, 1)]}, {**CONTENT, "best": float("inf")},
               dict(reversed(CONTENT.items()))]
    assert len({checksum(value) for value in [CONTENT, *others]}) == 1 + len(others)


def test_damage_to_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "a.pth"
    checkpoint.save_atomically(CONTENT, path)
    assert_same(checkpoint.load_file(path), torch.load(path, weights_only=True))
    whole = path.read_bytes()
    at = whole.index(CONTENT["model"]["a"].numpy().tobytes())
    path.write_bytes(whole[:at + 9] + bytes([whole[at + 9] ^ 1]) + whole[at + 10:])
    assert torch.load(path, weights_only=True)["step"] == 3  # PyTorch does not notice
    with pytest.raises(UserError, match="damaged: 'model' is not what was saved"):
        checkpoint.load_file(path)


@pytest.mark.parametrize("change, telling", [
    (lambda content: content.pop("best"), None),  # a copy for others
    (lambda content: content.update(license="MIT"), None),
    (lambda content: content.update(step=4), "'step' is not what was saved"),
    (lambda content: content.update(modem=content.pop("model")), "'modem' in place of 'model'"),
    (lambda content: content.update({CHECKSUMS: 1}), "checksums are not readable"),
    (lambda content: content["list"].append(CONTENT["model"]["a"].to_sparse()), "sparse")])
def test_a_copy_is_checked_entry_by_entry(change, telling, tmp_path):
    checkpoint.save_atomically(CONTENT, tmp_path / "a.pth")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "b.pth")
    if telling is None:
        assert checkpoint.load_file(tmp_path / "b.pth")["step"] == 3
        return
    with pytest.raises(UserError, match=telling):
        checkpoint.load_file(tmp_path / "b.pth")


X = torch.zeros(2, 3)
ODD = {"sparse": X.to_sparse, "meta": lambda: X.to("meta"), "complex": X.cfloat,
       "float64": X.double, "shape": X.t, "expanded": lambda: torch.zeros(1).expand(2, 3),
       "a list": lambda: [X], "none": lambda: None, "float8": lambda: X.to(torch.float8_e4m3fn),
       "nested": lambda: torch.nested.nested_tensor([X, X]),
       "quantized": lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", ODD)
def test_only_ordinary_tensors_of_the_right_form_pass(case):
    check_form({"x": X}, {"x": X}, "model")
    assert tensor_fault(X) is None
    with pytest.raises(ValueError, match=r"^model\.x (is|has)"):
        check_form({"x": ODD[case]()}, {"x": X}, "model")
    if case not in ("float64", "shape"):
        assert tensor_fault(ODD[case]())


@pytest.mark.parametrize("value, form, telling", [
    ({"a": 1}, {"a": 0, "b": 0}, "it lacks b"), ({"a": 1, "c": 1}, {"a": 0}, "an unknown c"),
    ([], {"a": 0}, "a list of 0, expected a dict"), ([1], [int, int], "expected 2 values"),
    (-1, int, "-1, expected a whole number from 0"), (2 ** 70, 0, "a int, expected a whole"),
    (True, int, "True"), (1.0, int, "1.0"), (float("nan"), 0.5, "nan, expected a number"),
    (1, float, "1, expected a number"), ("1", int, "a str"), (None, "x", "None, expected a str"),
    ({"a": 1.0, "b": "1"}, Named(float), r"\.b is a str"), ({1: 1.0}, Named(float), "a name in")])
def test_forms(value, form, telling):
    with pytest.raises(ValueError, match=telling):
        check_form(value, form, "")


def saved_state() -> tuple[engine.TrainState, dict]:
    """A state after two updates, and what it saves."""
    torch.manual_seed(0)
    state = make_state(create_model("resnet_nano", 10), {"ce": {}}, None, ema=True)
    for _ in range(2):
        for parameter in state.distiller.parameters():
            parameter.grad = torch.randn_like(parameter)
        engine.optimizer_update(state, None)
    state.classes = ["a", "b"]
    return state, copy.deepcopy(state.state_dict())


WRONG = {
    "model.bn1.weight": ("model.bn1.weight", lambda x: x.to_sparse()),
    "model_ema.fc.bias": ("model_ema.fc.bias", lambda x: x[:-1]),
    "model_ema": ("model_ema", lambda x: None),
    "ema_updates": ("ema_updates", lambda x: "2"),
    "optimizer": ("optimizer", lambda x: [x]),
    "optimizer.state": ("optimizer.state", lambda x: {**x, 999: x[0]}),
    "optimizer.state lacks 3": ("optimizer.state", lambda x: {k: x[k] for k in x if k != 3}),
    "optimizer.state.0.exp_avg": ("optimizer.state.0.exp_avg", lambda x: x.to("meta")),
    "optimizer.state.0.step": ("optimizer.state.0.step", lambda x: x.long()),
    "optimizer.param_groups is": ("optimizer.param_groups", lambda x: x[:-1]),
    "optimizer.param_groups[0].params": ("optimizer.param_groups.0.params", lambda x: x[::-1]),
    "optimizer.param_groups[0].betas": ("optimizer.param_groups.0.betas", lambda x: (0.9, 0.9)),
    "optimizer.param_groups[0].lr": ("optimizer.param_groups.0.lr", lambda x: float("nan")),
    "meter.counts lacks grad_norm": ("meter.counts", lambda x: {}),
    "meter.sums": ("meter.sums", lambda x: 1),
    "scaler has an unknown scale": ("scaler", lambda x: {"scale": 1.0}),
    "best_acc1": ("best_acc1", lambda x: float("nan")),
    "classes": ("classes", lambda x: x[::-1]),
    "losses": ("losses", lambda x: {"fd": torch.zeros(2)}),
    "sparsity": ("sparsity", lambda x: {"masks": {}}),
}


@pytest.mark.parametrize("named", WRONG)
def test_a_state_of_another_form_is_refused_by_name_and_nothing_is_taken_over(named):
    """Of a file without checksums, as older versions wrote them."""
    state, content = saved_state()
    other, before = make_state(create_model("resnet_nano", 10), {"ce": {}}, None, ema=True), None
    other.classes = state.classes
    before = copy.deepcopy(other.state_dict())
    *way, last = WRONG[named][0].split(".", 1) if WRONG[named][0].startswith("model") else (
        WRONG[named][0].split("."))
    place = content
    for word in way:
        place = place[int(word) if word.isdigit() else word]
    place[last] = WRONG[named][1](place[last])
    with pytest.raises(UserError, match="does not hold the state of this run") as error:
        checkpoint.restore(other, Path("f.pth"), {**content, "args": {}}, {})
    assert named in str(error.value) and "\n" not in str(error.value)
    assert_same(other.state_dict(), before)


def test_a_parameter_without_moments_is_believed_where_a_checksum_vouches_for_it():
    """It never had a gradient. The rest is restored to the bit."""
    state, content = saved_state()
    del content["optimizer"]["state"][3]
    other = make_state(create_model("resnet_nano", 10), {"ce": {}}, None, ema=True)
    other.classes = state.classes
    whole = copy.deepcopy(content)
    checkpoint.restore(other, Path("f.pth"), {**content, "args": {}, CHECKSUMS: {}}, {})
    assert_same(other.state_dict(), whole)


# A teacher in another place


def settings_of(**changes) -> dict:
    return {"teacher": ["resnet_nano"], "teacher_weights": "t.pth", "teacher_weights_key": None,
            checkpoint.TEACHER: "abc", **changes}


def without(settings: dict, name: str = checkpoint.TEACHER) -> dict:
    return {key: value for key, value in settings.items() if key != name}


def test_a_teacher_is_compared_by_its_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in (("t.pth", "same"), ("copy.pth", "same"), ("other.pth", "else")):
        Path(name).write_text(text)

    def compare(there: dict, here: dict) -> str:
        checkpoint._check_teacher(Path("c.pth"), there, here)
        return capsys.readouterr().out

    moved = settings_of(teacher_weights=str(tmp_path / "copy.pth"))
    assert compare(settings_of(), settings_of()) == ""
    assert "in another place" in compare(settings_of(), moved)
    with pytest.raises(UserError, match="other weights .*t.pth there, t.pth here"):
        compare(settings_of(), settings_of(**{checkpoint.TEACHER: "def"}))
    compare(settings_of(), without(moved))  # a dry run, which fetches none
    old = without(settings_of())  # as older versions wrote them
    assert compare(old, settings_of()) == ""
    assert "another place" in compare(old, settings_of(teacher_weights=str(tmp_path / "t.pth")))
    assert "another place" in compare(old, moved)
    with pytest.raises(UserError, match="other weights"):
        compare(old, settings_of(teacher_weights="other.pth"))
    with pytest.raises(UserError, match="other weights"):
        compare(old, settings_of(teacher_weights_key="model_ema"))
    Path("t.pth").unlink()
    assert "is taken for the same" in compare({**old, "teacher_weights": "gone/t.pth"}, moved)
    with pytest.raises(UserError, match="other weights"):
        compare({**old, "teacher_weights": "random"}, moved)


def test_a_recipe_may_name_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("teacher_weights: ~/t.pth\noutput_dir: ~/run\n")
    parsed = train_kd.build_parser().parse(
        ["--config", "~/recipe.yaml", "--data-path=~/images", "--student-weights", "random"])
    assert [parsed.teacher_weights, parsed.data_path, str(parsed.output_dir)] == [
        str(tmp_path / name) for name in ("t.pth", "images", "run")]
    assert parsed.student_weights == "random"


@pytest.mark.parametrize("name, value", [
    ("student", "resnet_nano"), ("student", []), ("num_classes", 10.0), ("num_classes", -1),
    ("input_size", True), ("crop_pct", "1"), ("lr", torch.zeros(2)), (3, 4), ("lr", {"a": 1}),
    ("loss", ["ce"]), ("loss", [[3]]),
    pytest.param("lr", [10 ** 5000], id="huge")])
def test_settings_of_other_types_are_refused_by_name(name, value):
    settings = {"student": ["resnet_nano"], "num_classes": 10, "input_size": 32, "lr": 0.1,
                "loss": [["kd", "weight=2"], ["ce"]]}
    checkpoint.check_settings(settings, Path("f.pth"))
    with pytest.raises(UserError, match=f"f.pth is damaged .* setting '?{name}'? is "):
        checkpoint.check_settings({**settings, name: value}, Path("f.pth"))
