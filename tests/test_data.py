"""Samples, keys and loaders as functions of counters; folders of images; the command line."""
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import data
import eval as evaluation
import train_kd
from data import loader as loading
from data.loader import EvalKeys, Samples, TrainKeys
from data.transforms import Transform, to_rgb
from utils.config import Parser, plain
from utils.registry import UserError

RECIPES = sorted((Path(__file__).parent.parent / "run_scripts" / "recipes").glob("*.yaml"))
AS_IT_IS = Transform(to_rgb, ())
WORKERS = dict(num_workers=0, skip_bad_images=False, pin_memory=False)


@pytest.fixture(scope="module")
def source() -> data.ImageSource:
    return data.create_dataset("outlines", "train", None, train_size=24, image_size=32)


def augmented(source: data.ImageSource, seed: int = 0) -> Samples:
    return Samples(source, data.train_transform(32), seed)


def ranks(monkeypatch, rank: int, world: int) -> None:
    monkeypatch.setattr(loading, "rank", lambda: rank)
    monkeypatch.setattr(loading, "world_size", lambda: world)


# Samples


def test_align_wants_the_models_classes():
    source = data.ImageSource()
    source.classes = ["cat", "dog"]
    source.align(None, 2)
    source.align(["cat", "dog"], 2)
    with pytest.raises(UserError, match="another order.*dog, cat instead of cat, dog"):
        source.align(["dog", "cat"], 2)
    with pytest.raises(UserError, match="has 2 classes.* lacks 1 of these: dog; .* cat, mouse"):
        source.align(["cat", "mouse"], 2)
    with pytest.raises(UserError, match="has 2 classes, the model 3"):
        source.align(None, 3)


def test_a_sample_depends_on_seed_epoch_and_index_alone(source):
    samples = augmented(source)
    keys = [(epoch, index) for epoch in (0, 1) for index in (0, 1, 5)]
    first = {key: samples[key].pixels for key in keys}
    torch.manual_seed(12345)
    np.random.seed(12345)
    for key in reversed(keys):
        assert torch.equal(augmented(source)[key].pixels, first[key])
    for a, b in itertools.combinations(keys, 2):
        assert not torch.equal(first[a], first[b]), (a, b)
    assert not torch.equal(augmented(source, seed=1)[keys[0]].pixels, first[keys[0]])


def test_a_sample_leaves_the_global_generator_alone(source):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    samples = augmented(source)
    for index in range(4):
        samples[0, index]
    assert torch.equal(torch.rand(4), expected)


def test_labels_and_indices_come_with_the_images(source):
    sample = augmented(source)[2, 13]
    assert sample.pixels.shape == (3, 32, 32) and sample.pixels.dtype == torch.uint8
    assert sample.erasure is None or len(sample.erasure) == 5
    assert (sample.label, sample.index, sample.readable) == (source.load(13)[1], 13, True)


class Spoilt(data.ImageSource):
    """Images of one level each, some of which cannot be read."""

    classes = ["only"]

    def __init__(self, size: int, bad: set[int]) -> None:
        self.size, self.bad, self.loads = size, bad, []

    def __len__(self) -> int:
        return self.size

    def load(self, index: int) -> tuple[Image.Image, int]:
        self.loads.append(index)
        if index in self.bad:
            raise OSError("truncated")
        return Image.new("RGB", (4, 4), (index, index, index)), 0

    def name_of(self, index: int) -> str:
        return f"sample {index}"


def test_the_next_readable_image_stands_in_for_one_that_is_not():
    samples = Samples(Spoilt(4, {1, 3}), AS_IT_IS, seed=0)
    seen = [(int(pixels[0, 0, 0]), index, readable)
            for pixels, _, _, index, readable in (samples[0, i] for i in range(4))]
    assert seen == [(0, 0, True), (2, 1, False), (2, 2, True), (0, 3, False)]


def test_all_unreadable_is_an_error_and_not_for_ever():
    with pytest.raises(UserError, match=r"none of the 3 images .* sample 1 \(\w"):
        Samples(Spoilt(3, {0, 1, 2}), AS_IT_IS, seed=0)[0, 1]


# Keys


def train_keys(size: int = 23, batch: int = 4, number: int = 5, seed: int = 0,
               epoch: int = 0) -> TrainKeys:
    keys = TrainKeys(size, batch, number, seed)
    keys.epoch = epoch
    return keys


def test_no_sample_twice_in_an_epoch_and_every_epoch_in_another_order():
    orders = [[index for batch in train_keys(epoch=epoch) for _, index in batch]
              for epoch in range(3)]
    for order in orders:
        assert len(set(order)) == len(order) == 20 and set(order) <= set(range(23))
    assert len({tuple(order) for order in orders}) == 3
    assert list(train_keys(seed=1)) != list(train_keys())
    assert {epoch for batch in train_keys(epoch=2) for epoch, _ in batch} == {2}


def test_every_sample_has_its_turn():
    """What an epoch leaves out changes with the epoch."""
    seen = {index for epoch in range(8) for batch in train_keys(epoch=epoch) for _, index in batch}
    assert seen == set(range(23))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batches_of_one(world, monkeypatch):
    whole = list(train_keys(batch=4))
    shares = []
    for rank in range(world):
        ranks(monkeypatch, rank, world)
        shares.append(list(train_keys(batch=4 // world)))
    for step, batch in enumerate(whole):
        assert sum((share[step] for share in shares), []) == batch


def repeated(batch: int, number: int = 3, epoch: int = 0) -> TrainKeys:
    keys = TrainKeys(23, batch, number, 0, repeated=True)
    keys.epoch = epoch
    return keys


def test_repeated_augmentation_takes_each_image_thrice_in_a_row():
    order = [index for batch in repeated(6) for _, index in batch]
    images, repetitions = [i % 23 for i in order], [i // 23 for i in order]
    assert repetitions == [0, 1, 2] * 6
    assert images[::3] == images[1::3] == images[2::3] and len(set(images[::3])) == 6
    plain = [index for batch in train_keys(batch=6, number=1) for _, index in batch]
    assert images[::3] == plain  # in the order of an epoch without
    assert list(repeated(6, epoch=1)) != list(repeated(6))
    later = repeated(6)
    later.start = 2
    assert list(later) == list(repeated(6))[2:]


def test_repetitions_go_to_different_processes(monkeypatch):
    whole = list(repeated(6))
    shares = []
    for rank in range(3):
        ranks(monkeypatch, rank, 3)
        shares.append(list(repeated(2)))
    for step, batch in enumerate(whole):
        assert sorted(sum((share[step] for share in shares), [])) == sorted(batch)
        for share in shares:
            assert len({index % 23 for _, index in share[step]}) == 2


def test_repetitions_of_an_image_have_augmentations_of_their_own():
    class Noise:
        def __call__(self, image: Image.Image) -> Image.Image:
            return Image.new("RGB", image.size, tuple(torch.randint(256, (3,)).tolist()))

    samples = Samples(Spoilt(4, set()), Transform(to_rgb, (Noise(),)), seed=0)
    first, second, again = [samples[0, index] for index in (1, 5, 5)]
    assert not first.pixels.equal(second.pixels) and second.pixels.equal(again.pixels)
    assert first.label == second.label


def test_keys_start_anywhere():
    whole = list(train_keys(epoch=1))
    for start in range(6):
        keys = train_keys(epoch=1)
        keys.start = start
        assert list(keys) == whole[start:] and len(keys) == 5 - start


@pytest.mark.parametrize("size", [1, 2, 5, 7, 12])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_covers_everything_once(size, world, monkeypatch):
    seen = []
    for rank in range(world):
        ranks(monkeypatch, rank, world)
        batches = list(EvalKeys(size, 2))
        assert len(batches) == len(EvalKeys(size, 2)) and all(map(len, batches))
        seen += [index for batch in batches for _, index in batch]
    assert sorted(seen) == list(range(size))


# Loader


def train_loader(source: data.ImageSource, **changes) -> data.Loader:
    return data.train_loader(source, data.train_transform(32), **{
        "batch_size": 4, "num_batches": 6, "seed": 0, **WORKERS, **changes})


def assert_same(left: list, right: list) -> None:
    assert len(left) == len(right) > 0
    for (images, *rest), (others, *other_rest) in zip(left, right):
        assert torch.equal(images.pixels, others.pixels)
        assert torch.equal(images.erased, others.erased)
        assert images.num_erased == others.num_erased
        assert all(torch.equal(x, y) for x, y in zip(rest, other_rest))


def test_batches_do_not_depend_on_workers_and_continue_where_they_stopped(source):
    plain_loader = train_loader(source)
    epochs = [list(plain_loader.start_at(epoch, 0)) for epoch in (0, 1)]
    assert [len(epoch) for epoch in epochs] == [6, 6]
    assert not torch.equal(epochs[0][0].indices, epochs[1][0].indices)
    torch.manual_seed(99)
    with_workers = train_loader(source, num_workers=2)  # the same workers for all epochs
    for epoch, start in ((0, 0), (1, 0), (1, 4), (0, 5)):
        assert len(with_workers.start_at(epoch, start)) == 6 - start
        assert_same(list(with_workers), epochs[epoch][start:])
        assert_same(list(train_loader(source).start_at(epoch, start)), epochs[epoch][start:])


def test_a_continued_loader_does_not_read_what_was_before():
    source = Spoilt(24, set())
    loader = data.train_loader(source, AS_IT_IS, **{
        "batch_size": 4, "num_batches": 6, "seed": 0, **WORKERS})
    indices = [batch.indices for batch in loader.start_at(0, 5)]
    assert source.loads == torch.cat(indices).tolist() and len(source.loads) == 4


def evaluate_all(source: data.ImageSource, **changes) -> list[data.Batch]:
    return list(data.eval_loader(source, AS_IT_IS, **{
        "batch_size": 4, "num_workers": 0, **changes}))


def test_evaluation_batches_are_in_order():
    batches = evaluate_all(Spoilt(10, set()))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(10))
    assert [len(batch.images) for batch in batches] == [4, 4, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_reported_once(workers, capsys):
    loader = data.eval_loader(Spoilt(9, {2, 8}), AS_IT_IS, batch_size=4, num_workers=workers,
                              skip_bad_images=True)
    for _ in range(2):
        batches = list(loader)
        assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(9))
        readable = torch.cat([batch.readable for batch in batches])
        assert (~readable).nonzero().flatten().tolist() == [2, 8]
    printed = capsys.readouterr().err
    assert printed.count("cannot read the image sample 2 (truncated); skipped, 1 so far") == 1
    assert printed.count("sample 8 (truncated); skipped, 2 so far") == 1
    assert printed.count("skipped") == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_an_error_unless_allowed(workers):
    with pytest.raises(UserError, match=r"sample 2 \(truncated\).*--skip-bad-images"):
        evaluate_all(Spoilt(9, {2, 8}), num_workers=workers)


def big_jpeg(path: Path, size: tuple[int, int] = (500, 400)) -> None:
    """Smooth shapes and fine noise, as a photograph has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    coarse = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
    noise = rng.integers(-8, 9, pixels.shape)
    Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(path, quality=90)


def test_outlines_through_the_registry():
    train, val = data.create_splits(["outlines", "train_size=30", "val_size=11", "seed=4"], None)
    assert (len(train), len(val)) == (30, 11) and train.classes == val.classes
    images = [source.load(3)[0] for source in (train, val)]
    assert images[0].size == (64, 64) and images[0].mode == "RGB"
    assert images[0].tobytes() != images[1].tobytes()
    again = data.create_dataset("outlines", "train", None, train_size=1000, seed=4)
    assert again.load(3)[0].tobytes() == images[0].tobytes()
    other = data.create_dataset("outlines", "train", None, train_size=30, seed=5)
    assert other.load(3)[0].tobytes() != images[0].tobytes()
    assert "train" in train.name_of(3) and "3" in train.name_of(3)


@pytest.mark.parametrize("options", [{"part": 3}, {"data_path": 3}, {"name": "x"}])
def test_what_the_program_passes_is_no_option(options):
    with pytest.raises(UserError, match=f"^{next(iter(options))} .*data set 'imagefolder'"):
        data.create_dataset("imagefolder", "train", None, **options)


def test_a_part_as_an_option_gets_one_sentence(capsys, tmp_path):
    code = train_kd.main(["--teacher", "none", "--data-set", "imagefolder", "part=3",
                          "--output-dir", str(tmp_path / "runs")])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and not (tmp_path / "runs").exists()
    assert lines[0].startswith("train_kd.py: error: part ") and "'imagefolder'" in lines[0]


# The command line and recipes


def small_parser() -> Parser:
    parser = train_kd.build_parser()
    assert isinstance(parser, Parser)
    return parser


def parse(*words: str):
    return small_parser().parse(list(words))


def recipe(folder: Path, text: str) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_underscores_are_dashes():
    for words in (("--data-path", "a_b"), ("--data_path", "a_b"), ("--data_path=a_b",)):
        args = parse(*words)
        assert args.data_path == "a_b" and args.given == ["data_path"]
    assert parse("--update_freq", "4").accum_steps == 4
    assert parse("--no_model_ema").model_ema is False
    assert parse("--student", "convnext_nano", "drop_path=0.1").student == [
        "convnext_nano", "drop_path=0.1"]


@pytest.mark.parametrize("name", ["model-ema", "skip-bad-images", "fast-decode", "auto-resume",
                                  "compile"])
def test_booleans_go_both_ways(name):
    dest = name.replace("-", "_")
    assert getattr(parse(f"--{name}"), dest) is True
    assert getattr(parse(f"--no-{name}"), dest) is False
    assert parse(f"--no-{name}").given == [dest]


def test_flags_are_not_abbreviated():
    with pytest.raises(UserError, match="'--epoch'.*Did you mean '--epochs'"):
        parse("--epoch", "3")


def test_a_recipe_sets_defaults_and_the_command_line_wins(tmp_path):
    words = recipe(tmp_path, "epochs: 7\nlr: 2e-3\nmodel_ema: true\nmin-lr: 0\n"
                   "student: convnext_nano drop_path=0.1\ndata-set: [outlines, train_size=5]\n"
                   "scale: [0.5, 1]\nclip-grad: null\n")
    args = parse(*words)
    assert (args.epochs, args.lr, args.model_ema, args.min_lr) == (7, 2e-3, True, 0.0)
    assert isinstance(args.min_lr, float) and isinstance(args.scale[1], float)
    assert args.student == ["convnext_nano", "drop_path=0.1"]
    assert args.data_set == ["outlines", "train_size=5"]
    assert args.scale == [0.5, 1.0] and args.clip_grad is None and args.given == ["config"]
    args = parse(*words, "--epochs", "8", "--no-model-ema", "--student", "resnet_nano")
    assert (args.epochs, args.model_ema, args.student) == (8, False, ["resnet_nano"])
    assert args.lr == 2e-3 and args.given == ["config", "epochs", "model_ema", "student"]
    before = parse("--epochs", "8", *words)  # wherever the recipe stands
    assert before.epochs == 8


def test_losses_of_the_command_line_replace_those_of_the_recipe(tmp_path):
    words = recipe(tmp_path, "loss: [nkd gamma=2, fd weight=0.1]\n")
    for _ in range(2):  # the defaults are not added to either
        assert parse(*words).loss == [["nkd", "gamma=2"], ["fd", "weight=0.1"]]
    assert parse(*words, "--loss", "kd", "--loss", "fd").loss == [["kd"], ["fd"]]
    assert parse(*recipe(tmp_path, "loss: kd temperature=2\n")).loss == [["kd", "temperature=2"]]
    assert parse().loss is None


def test_parsing_twice_leaves_no_trace(tmp_path):
    parser = small_parser()
    first = parser.parse(recipe(tmp_path, "loss: [nkd]\nscale: [0.5, 1]\n"))
    first.loss.append(["fd"]), first.scale.append(3)
    assert small_parser().parse([]).scale == [0.08, 1.0]
    assert small_parser().parse([]).loss is None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_accepted_and_every_key_arrives(path):
    args = plain(parse("--config", str(path)))
    content = yaml.safe_load(path.read_text())
    assert content
    for key, value in content.items():
        got = args[key.replace("-", "_")]
        if key == "loss":
            value = [str(item).split() for item in (value if isinstance(value, list) else [value])]
        elif isinstance(got, list) and isinstance(value, str):
            value = value.split()
        elif isinstance(value, str) and not isinstance(got, str):
            value = float(value)  # YAML 1.1 reads 1e-3 as text
        assert got == value, key


def test_the_imagenet_recipe_is_the_default():
    path = next(path for path in RECIPES if path.name == "imagenet.yaml")
    with_recipe, without = (plain(parse(*words)) for words in (["--config", str(path)], []))
    assert with_recipe.pop("config") == str(path) and without.pop("config") is None
    assert with_recipe == without
    keys = {key.replace("-", "_") for key in yaml.safe_load(path.read_text())}
    assert {"lr", "epochs", "mixup", "effective_batch", "weight_decay", "aa"} <= keys
    assert keys <= without.keys()


def test_what_the_run_folder_gets_is_plain():
    args = parse("--output-dir", "x", "--resume", "y.pth")
    values = plain(args)
    assert values["output_dir"] == "x" and values["resume"] == "y.pth" and "given" not in values
    assert yaml.safe_load(yaml.safe_dump(values)) == values


@pytest.mark.parametrize("program", [train_kd, evaluation])
def test_help_names_every_flag(program, capsys):
    with pytest.raises(SystemExit) as stop:
        program.build_parser().parse(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for action in program.build_parser()._actions:
        assert action.option_strings[-1] in printed and action.help, action.dest
