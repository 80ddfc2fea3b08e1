"""Words of the command line: guesses at misspelt ones, other programs' words, and what is no word
at all."""
import json

import numpy as np
import pytest
import yaml

import data
import eval as evaluation
import losses
import models
import train_kd
from analysis.benchmark.__main__ import COMMANDS
from analysis.erf import read_field
from models.base import MODELS
from utils.config import Parser
from utils.records import read_records, read_yaml
from utils.registry import UserError, did_you_mean, parse_spec

KNOWN = {
    "flag": list(train_kd.build_parser()._option_string_actions),
    "model": models.list_models(), "loss": losses.list_losses(), "data set": data.list_datasets(),
    "option": ["depths", "dims", "drop_path", "zero_init_residual", "weight", "temperature"],
    "benchmark": list(COMMANDS)}
GUESSES = [
    ("flag", "--mix-up", "--mixup"), ("flag", "--data-pth", "--data-path"),
    ("flag", "--epoch", "--epochs"), ("flag", "--losses", "--loss"),
    ("flag", "--ratios", "--ratio"),
    ("flag", "--lr-min", "--min-lr"), ("flag", "--weigth-decay", "--weight-decay"),
    ("flag", "--hlfip", "--hflip"), ("flag", "--smothing", "--smoothing"),
    ("flag", "--workers", "--num-workers"), ("flag", "--num-work", "--num-workers"),
    ("flag", "--teach", "--teacher"), ("flag", "--outputdir", "--output-dir"),
    ("flag", "--data", "--data-on' or '--data-path' or '--data-set"),
    ("model", "slak-t", "slak_t"), ("model", "salk_t", "slak_t"), ("model", "ResNet50", "resnet50"),
    ("model", "swin", "swin_nano' or 'swin_t"), ("model", "deit", "deit_s"),
    ("model", "convnxt_t", "convnext_t"), ("loss", "nkdd", "nkd"), ("loss", "dk", "kd"),
    ("loss", "mdg", "mgd"), ("data set", "imagefoldr", "imagefolder"),
    ("data set", "outline", "outlines"), ("option", "droppath", "drop_path"),
    ("option", "dept", "depths"), ("option", "dim", "dims"),
    ("option", "temprature", "temperature"),
    ("benchmark", "masks", ""), ("benchmark", "mask", "masking"), ("benchmark", "steps", "step"),
    # What is not near.
    ("flag", "--lerning-rate", ""), ("flag", "--rate", ""), ("flag", "--print-rate", ""),
    ("flag", "--decay", ""), ("flag", "--teacher-lr", ""), ("flag", "--s", ""),
    ("flag", "--wd", ""),
    ("flag", "--optimiser", ""), ("flag", "--gpu", ""), ("flag", "--" + "x" * 10 ** 6, ""),
    ("flag", "", ""), ("model", "resnet152", ""), ("model", "resnet55", ""), ("model", "vgg16", ""),
    ("model", "convnext", ""), ("model", "swin_b", ""), ("model", "slak_x", ""),
    ("loss", "rkd", ""),
    ("loss", "crd", ""), ("loss", "fitnet", ""), ("data set", "imagenet_v3", ""),
    ("data set", "mnist", ""), ("option", "seed", ""),
    ("option", "alpha", "")]


@pytest.mark.parametrize("kind, word, nearest", GUESSES, ids=[word[1][:20] for word in GUESSES])
def test_guesses_are_near_or_not_made(kind, word, nearest):
    expected = f" Did you mean '{nearest}'?" if nearest else ""
    assert did_you_mean(word, KNOWN[kind]) == expected


def values_of(parser: Parser, words: str) -> dict:
    return vars(parser.parse(words.split()))


@pytest.mark.parametrize("theirs, ours", [
    ("--model_ema true", "--model-ema"), ("--model_ema false", "--no-model-ema"),
    ("--model_ema=True", "--model-ema"), ("--auto_resume false", "--no-auto-resume"),
    ("--use_amp true", "--amp auto"), ("--use_amp false", "--amp none"),
    ("--use_amp", "--amp auto"),
    ("--data_set IMNET", "--data-set imagenet"), ("--data-set CIFAR", "--data-set cifar100"),
    ("--data_set image_folder", "--data-set imagefolder"), ("--finetune F", "--student-weights F"),
    ("--drop_path 0.1", "--student resnet50 drop_path=0.1"),
    ("--model slak_t --drop-path=0.1 --head_init_scale 0.5",
     "--student slak_t drop_path=0.1 head_init_scale=0.5"),
    ("--student timm model=convnext_atto --drop_path 0.1",
     "--student timm model=convnext_atto drop_path_rate=0.1"),
    ("--drop_path 0.1 --student torchvision model=swin_t",
     "--student torchvision model=swin_t stochastic_depth_prob=0.1"),
    ("--model convnext_t --layer_scale_init_value 0",
     "--student convnext_t layer_scale_init=0"),
    ("--opt adamw", ""), ("--update_freq 4", "--accum-steps 4"),
    ("--grad-accum-steps 4", "--accum-steps 4"), ("--save_ckpt_freq 5", "--save-freq 5"),
    ("--save_ckpt_num 5", "--save-num 5"), ("--checkpoint-hist 5", "--save-num 5"),
    ("--eval-crop-ratio 0.9", "--crop-pct 0.9"), ("--workers 3", "--num-workers 3"),
    ("--model_key model", "--student-weights-key model"),
    ("--teacher-model slak_t", "--teacher slak_t"), ("--teacher-path F", "--teacher-weights F"),
    ("--kd-model-name resnet50", "--teacher resnet50"),
    ("--pretrained", "--student-weights published"),
    ("--data-dir D", "--data-path D"), ("--img-size 128", "--input-size 128"),
    ("--output O", "--output-dir O"), ("--bce-loss", "--bce"),
    ("--ThreeAugment", "--aa 3a"), ("--log-interval 3", "--print-every 3")])
def test_words_of_other_programs_for_training(theirs, ours):
    expected = values_of(train_kd.build_parser(), ours)
    found = values_of(train_kd.build_parser(), theirs)
    for record in ("given", "chosen"):  # of a flag that gives the student an option, or a default
        found.pop(record), expected.pop(record)
    assert found == expected


@pytest.mark.parametrize("theirs, ours", [
    ("--resume F", "--checkpoint F"), ("--model M --finetune F", "--model M --weights F"),
    ("--model M --pretrained true", "--model M --weights published"),
    ("--nb_classes 10", "--num-classes 10"), ("--dataset IMNET", "--data-set IMNET"),
    ("--skip-bad-images true", "--skip-bad-images")])
def test_words_of_other_programs_for_evaluation(theirs, ours):
    parser = evaluation.build_parser()
    assert values_of(parser, theirs) == values_of(parser, ours)


def test_recipes_may_have_them_too(tmp_path):
    (tmp_path / "r.yaml").write_text("model: convnext_tiny\ndrop_path: 0.1\nuse_amp: false\n"
                                     "update_freq: 2\nmodel_ema: true\n")
    words = ["--config", str(tmp_path / "r.yaml")]
    args = train_kd.build_parser().parse(words)
    assert args.student == ["convnext_t", "drop_path=0.1"] and args.amp == "none"
    assert args.accum_steps == 2 and args.model_ema
    args = train_kd.build_parser().parse([*words, "--drop-path", "0.2", "--student", "resnet18"])
    assert args.student == ["resnet18", "drop_path=0.2"]


@pytest.mark.parametrize("words, telling", [
    ("--eval --resume F --data_path D", "python eval.py --checkpoint F --data-path D"),
    ("--eval", "python eval.py --checkpoint FILE"), ("--dist_eval true", "always shared"),
    ("--no-pin-mem", "pinned"), ("--sched cosine", "--min-lr"),
    ("--nb_classes 10", "from the data"),
    ("--unscale-lr", "never scaled"), ("--model_ema maybe", "--model-ema must be true or false"),
    ("--student slak_t drop_path=0 --drop_path 0.1", "drop_path is given twice"),
    ("--student slak_t drop_path=0 drop-path=0", "drop_path is given twice"),
    ("--student slak_t drop_path=nan", "drop_path must be a finite number"),
    ("--loss nkd weight=99999999999999999999", "weight must be a finite number of at most 64 bits"),
    ("--epochs 99999999999", "--epochs must be at most 2147483647"),
    ("--resume=", "--resume must be a path, got ''"), ("--aa a\0b", "null character"),
    ("--amp=--", "--amp takes a value"),
    (f"--aa {'x' * 5000}", "no word may have more than"), ("--lr " + "9" * 500, "finite number")])
def test_what_is_refused_tells_what_to_do(words, telling, capsys):
    assert train_kd.main(words.split(" ")) == 2
    said = capsys.readouterr().err
    assert telling in said and len(said) < 500


def test_a_network_has_one_name():
    assert not {"convnext_tiny", "swin_tiny_patch4_window7_224"} & {*models.list_models()}
    aliases = MODELS._aliases
    assert {"convnext_tiny", "swin_tiny_patch4_window7_224", "deit_small_patch16_224"} <= {*aliases}
    for alias, name in aliases.items():
        assert MODELS.resolve(alias) == name and MODELS.builder(alias) is MODELS.builder(name)
    args = train_kd.build_parser().parse(["--model", "swin_tiny_patch4_window7_224", "a=b"])
    assert args.student == ["swin_t", "a=b"]


@pytest.mark.parametrize("name, options", [
    ("resnet_nano", "dims=100000,100000,100000,100000"), ("resnet_nano", "depths=9999999,1,1,1"),
    ("vit_nano", "depth=999999999"), ("vit_nano", "dim=96000000"), ("swin_nano", "dim=24000000"),
    ("efficientnet_nano", "width=1e9"), ("mobilenetv3_nano", "width=1e9"),
    ("slak_nano", "kernel_size=10000001,15,7,3,3"), ("slak_nano", "width_factor=1e9"),
    ("cswin_nano", "dim=9223372036854775800")])
def test_a_network_beyond_memory_is_refused(name, options):
    with pytest.raises(UserError):
        models.create_model(name, 10, **parse_spec([name, options], "--model")[1])


# Files of values


BOMB = "a: &a [1, 2]\n" + "".join(f"{new}: &{new} [*{old}, *{old}]\n"
                                   for old, new in zip("abcdefgh", "bcdefghi"))


@pytest.mark.parametrize("content", [
    "epochs: 1\nepochs: 2", "lr: 2001-99-99", BOMB, "a: " + "[" * 1500, "!!python/name:os.system x",
    "lr: !!binary x", "lr: !!timestamp x", "? [1]\n: 2", "1: 2", "- a", "text", "a:\tb\n\t- c",
    "epochs: 1:30", "seed: 010",
    b"\xff\xfe\x00x", "lr: " + "9" * 5000, "x: " + "y" * 2 ** 19, "%YAML 9"])
def test_what_is_no_mapping_of_settings_is_refused(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError):
        read_yaml(path)


@pytest.mark.parametrize("content, telling", [
    ("lr: 2001-01-01", "takes words or numbers"), ("lr: [1, 2]", "takes words or numbers"),
    ("loss: [[[ce]]]", "takes words or numbers"), ("student: [{a: 1}]", "takes words or numbers"),
    ("accum_steps: 2\nupdate_freq: 3", "are the same; keep one"), ("config: x", "unknown key"),
    ("eval: true", "python eval.py"), ("lerning_rate: 1", "unknown key 'lerning_rate'. See")])
def test_recipes_of_odd_values_are_refused(tmp_path, content, telling, capsys):
    (tmp_path / "r.yaml").write_text(content)
    assert train_kd.main(["--config", str(tmp_path / "r.yaml")]) == 2
    said = capsys.readouterr().err
    assert telling.removesuffix(" See") in said and "Did you mean" not in said


def test_what_a_run_writes_is_read_again(tmp_path):
    shared = ["resnet50"]  # yaml writes it once, and a reference
    settings = {"teacher": shared, "student": shared, "scale": [0.08, 1.0], "loss": [["ce"]]}
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(settings))
    assert read_yaml(tmp_path / "args.yaml") == settings


@pytest.mark.parametrize("line", ["", "[]", "3", "null", '{"epoch": 1', '{"epoch": true}',
                                  '{"epoch": -1}', '{"epoch": 1.5}', '{"epoch": 1e999}',
                                  "[" * 10 ** 5, '{"epoch": ' + "9" * 5000 + "}", "\xff"])
def test_what_is_no_record_is_refused(tmp_path, line):
    path = tmp_path / "log.txt"
    path.write_bytes(json.dumps({"epoch": 0}).encode() + b"\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match="line 2 of"):
        read_records(path)


def npy(array: np.ndarray, folder) -> bytes:
    np.save(folder / "x.npy", array)
    return (folder / "x.npy").read_bytes()


MAPS = {
    "zip": lambda folder: b"PK\x03\x04 no zip", "empty": lambda folder: b"",
    "cut": lambda folder: npy(np.ones((8, 8)), folder)[:200],
    "huge": lambda folder: npy(np.ones((8, 8)), folder).replace(b"(8, 8), }      ",
                                                                b"(9999999999,8)}"),
    "header": lambda folder: npy(np.ones((8, 8)), folder).replace(b"'shape'", b"'sha(e'"),
    "unclosed": lambda folder: npy(np.ones((8, 8)), folder).replace(b"}", b"("),
    "complex": lambda folder: npy(np.ones((8, 8), complex), folder),
    "object": lambda folder: npy(np.array([[object]]), folder),
    "words": lambda folder: npy(np.array([["a"]]), folder),
    "nan": lambda folder: npy(np.full((8, 8), np.nan), folder),
    "sum": lambda folder: npy(np.full((8, 8), 1e308), folder),
    "one row": lambda folder: npy(np.ones(8), folder)}


@pytest.mark.parametrize("case", MAPS)
def test_what_is_no_map_is_refused(case, tmp_path):
    (tmp_path / "map.npy").write_bytes(MAPS[case](tmp_path))
    with pytest.raises(UserError, match="--matrix .*map.npy"):
        read_field(tmp_path / "map.npy")
