"""Networks of timm and torchvision by name, networks of the user's own, and teachers without a
classifier."""
import copy
import importlib.util
import sys

import pytest
import torch
import torchvision
from torch import nn

import engine
import train_kd
from analysis.complexity import meta_model
from analysis.erf import contributions
from models import create_model
from models.base import IMAGENET_MEAN, IMAGENET_STD, VisionModel, check_spec, model_from_spec
from models.distiller import Distiller, FrozenTeacher
from models.library import LibraryNetwork, TimmNetwork, stride_of
from models.weights import load_student, load_teacher, load_trained
from tests.helpers import fill_by_name, make_batches, make_options, make_state, no_mix
from utils.classes import imagenet_wnids
from utils.metrics import teacher_metrics
from utils.registry import UserError

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason=(
    "timm is not installed: pip install timm, or -r requirements-dev.txt"))
TINY_VIT = ["timm", "model=test_vit", "img_size=32"]


def random_images(number: int, size: int) -> torch.Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(0))


def build(spec: list[str], num_classes: int = 7) -> VisionModel:
    torch.manual_seed(0)
    return model_from_spec(spec, "--student", num_classes).eval()


def check_contract(model: LibraryNetwork, size: int) -> None:
    """The library's own logits to the bit, maps as declared, and one step as a teacher."""
    images = random_images(2, size)
    with torch.no_grad():
        output, expected = model.forward_with_features(images), model.network(images)
    assert torch.equal(output.logits, expected) and expected.shape == (2, 7)
    assert len(output.features) == len(model.feature_info) > 0
    for feature, info in zip(output.features, model.feature_info):
        assert feature.shape[:2] == (2, info.channels) and feature.shape[2] == feature.shape[3]
        assert abs(feature.shape[2] - size / info.stride) < 2 and feature.isfinite().all()
    strides = [info.stride for info in model.feature_info]
    assert strides == sorted(set(strides)) and strides[0] >= 4
    assert model.count_macs(size) > 0
    teacher = FrozenTeacher(model, IMAGENET_MEAN, IMAGENET_STD)
    state = make_state(create_model("resnet_nano", 7), {"nkd": {}, "fd": {}}, teacher)
    batches = [batch._replace(labels=batch.labels % 7) for batch in make_batches(1, 2, 32)]
    engine.accumulate_gradients(state, iter(batches), teacher, no_mix, make_options())
    means = state.meter.means()
    assert means["nkd"] > 0 and means["fd"] > 0 and not state.meter.failures()


# The smallest of each family of timm, fewer layers and small images where that takes long.
FAMILIES = """
test_vit
vit_small_patch14_reg4_dinov2 img_size=56 depth=2
test_vit_relpos
deit_tiny_distilled_patch16_224 img_size=64 depth=2
beitv2_base_patch16_224 img_size=64 depth=2 embed_dim=96 num_heads=3
eva02_tiny_patch14_224 img_size=56 depth=2
cait_xxs24_224 img_size=64 depth=2
convit_tiny img_size=64 depth=2
xcit_nano_12_p16_224 img_size=64 depth=2
pit_ti_224
levit_128s
gmixer_12_224 img_size=64
tnt_s_legacy_patch16_224 img_size=64 depth=2
pvt_v2_b0
swin_tiny_patch4_window7_224 img_size=56 embed_dim=24 num_heads=1,2,4,8
swinv2_tiny_window8_256 img_size=64 embed_dim=24 num_heads=1,2,4,8
swinv2_cr_tiny_224 embed_dim=24 num_heads=1,2,4,8
test_maxvit
test_coatnet
davit_tiny embed_dims=24,48,96,192
gcvit_xxtiny img_size=64
test_mambaout
poolformer_s12
efficientformerv2_s0
efficientvit_b0
efficientvit_m0
efficientvim_m1
fastvit_t8
mobilevit_xxs
mobilenetv4_conv_small
mobilenetv3_small_050
ghostnet_050
repghostnet_050
repvit_m0_9
tiny_vit_5m_224
swiftformer_xs
shvit_s1
starnet_s1
fasternet_t0
edgenext_xx_small
inception_next_atto
test_convnext
test_byobnet
test_nfnet
test_efficientnet
test_resnet
regnetx_002
rexnet_100
cs3darknet_focus_s
cspnext_tiny
csatv2
hgnetv2_b0
iformer_t
lowformer_b0
cpubone_nano
resnetv2_18
skresnet18
legacy_seresnet18
ese_vovnet19b_slim
"""


@needs_timm
@pytest.mark.slow
@pytest.mark.parametrize("line", FAMILIES.strip().splitlines())
def test_families_of_timm(line):
    model = build(["timm", *f"model={line}".split()])
    if hasattr(model.network, "group_matcher"):
        parts, names = model.parts(), [*dict(model.named_parameters())]
        found = [{name for name in names for block in part for place in block
                  if f"{name}.".startswith(f"{place}.")} for part in parts]
        assert sum(map(len, found)) == len(set().union(*found))  # none is in two stages
        assert len(parts) == 1 + len(model.feature_info) and all(found)
        heads = {f"{head}.{end}" for head in model.classifiers for end in ("weight", "bias")}
        assert not heads & set().union(*found)
    size = model.input_size if model.fixed_size else 64
    check_contract(model, size)
    images = random_images(2, size)
    with torch.no_grad():
        expected = model(images)
        halved = model.to_half(torch.bfloat16)(images.bfloat16())
    assert (halved.float() - expected).norm() < 0.1 * expected.norm() + 0.01


@pytest.mark.parametrize("name, classifier, stages", [
    ("squeezenet1_1", "classifier.1", [(128, 4), (256, 8), (512, 16)]),
    ("shufflenet_v2_x0_5", "fc", [(24, 4), (48, 8), (96, 16), (1024, 32)]),
    *[pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("resnet18", "fc", [(64, 4), (128, 8), (256, 16), (512, 32)]),
        ("swin_t", "head", [(96, 4), (192, 8), (384, 16), (768, 32)]),
        ("vit_b_32", "heads.head", [(768, 32)]),
        ("densenet121", "classifier", [(256, 4), (512, 8), (1024, 16), (1024, 32)]),
        ("regnet_y_400mf", "fc", [(48, 4), (104, 8), (208, 16), (440, 32)]),
        ("mobilenet_v3_small", "classifier.3", [(16, 4), (24, 8), (48, 16), (576, 32)]),
        ("efficientnet_b0", "classifier.1", [(24, 4), (40, 8), (112, 16), (1280, 32)]),
        ("convnext_tiny", "classifier.2", [(96, 4), (192, 8), (384, 16), (768, 32)]),
        ("googlenet", "fc", [(192, 4), (480, 8), (832, 16), (1024, 32)]),
        ("mnasnet0_5", "classifier.1", [(16, 4), (24, 8), (48, 16), (1280, 32)]),
        ("maxvit_t", "classifier.5", [(64, 4), (128, 8), (256, 16), (512, 32)]))]])
def test_families_of_torchvision(name, classifier, stages):
    model = build(["torchvision", f"model={name}"])
    assert model.feature_info == tuple(stages) and model.classifiers == (classifier,)
    theirs = torchvision.models.get_model(name)
    assert [*model.state_dict()] == [key for key in theirs.state_dict() if "aux" not in key]
    fill_by_name(model)  # a ViT's head starts at zero
    check_contract(model, model.input_size if model.fixed_size else 96)
    depths = model.layer_ids()
    assert depths.keys() == dict(model.named_parameters()).keys()
    assert min(depths.values()) == 0 and depths[f"{classifier}.weight"] == max(depths.values()) > 4
    assert len(model.parts()) == 1 + len(stages)


@pytest.mark.parametrize("input_size, side, said, stride", [
    (224, 7, None, 32), (300, 10, None, 32), (518, 37, None, 14), (224, 16, None, 14),
    (299, 8, None, 32), (224, 27, None, 8), (56, 4, 14, 14), (224, 7, 16, 32), (224, 4, 64, 64)])
def test_stride_of(input_size, side, said, stride):
    assert stride_of(input_size, side, said) == stride


# Under the library's names


@needs_timm
def test_what_is_trained_here_loads_into_timm(tmp_path):
    import timm
    spec = ["timm", "model=test_convnext", "drop_path_rate=0.1"]
    model = fill_by_name(build(spec))
    path = tmp_path / "checkpoint-best.pth"
    torch.save({"model": model.state_dict(), "classes": [*"abcdefg"],
                "args": {"student": spec, "num_classes": 7, "input_size": 64}}, path)
    theirs = timm.create_model("test_convnext", num_classes=7, checkpoint_path=str(path)).eval()
    trained = load_trained(path)
    images = random_images(2, 64)
    with torch.no_grad():
        assert torch.equal(theirs(images), model(images))
        assert torch.equal(trained.model.eval()(images), model(images))
    assert trained.classes == [*"abcdefg"]


@needs_timm
def test_a_copy_is_one_network_of_its_own():
    model = build(TINY_VIT)
    clone = copy.deepcopy(model)
    images = random_images(1, 32)
    with torch.no_grad():
        before = model(images)
        clone.cls_token.add_(1)  # of its root, which both tables hold
        assert torch.equal(model(images), before) and not torch.equal(clone(images), before)
    assert clone.network.cls_token is clone.cls_token
    clone.train()
    assert clone.network.training and not model.network.training


@needs_timm
def test_configuration_of_timm():
    import timm
    model = build(["timm", "model=vit_tiny_patch16_224.augreg_in21k_ft_in1k", "depth=1"])
    config = timm.data.resolve_model_data_config(model.network)
    assert model.input_mean == model.input_std == config["mean"] == config["std"] == (0.5,) * 3
    assert (model.input_size, model.fixed_size, model.input_resize) == (224, True, 248)
    assert model.classifiers == ("head",) and model.published_classes == imagenet_wnids()
    names = model.no_weight_decay()
    assert {"pos_embed", "cls_token"} <= names <= dict(model.named_parameters()).keys()
    depths = model.layer_ids()
    assert (depths["patch_embed.proj.weight"], depths["blocks.0.norm1.bias"]) == (0, 1)
    small = build(["timm", "model=vit_tiny_patch16_224", "depth=1", "dynamic_img_size=true"])
    assert not small.fixed_size and small(random_images(1, 64)).shape == (1, 7)
    assert build(["timm", "model=vit_small_patch14_dinov2", "depth=1", "img_size=56"]
                 ).published_classes == []


@needs_timm
def test_out_indices_choose_maps():
    model = build([*TINY_VIT, "out_indices=1,-1"])
    with torch.no_grad():
        features = model.forward_with_features(random_images(2, 32)).features
    last = len(model.network.blocks) - 1
    assert model.indices == [1, last] and model.feature_info == ((64, 16),) * 2
    with torch.no_grad():
        _, maps = model.network.forward_intermediates(random_images(2, 32))
    assert torch.equal(features[0], maps[1])
    with pytest.raises(UserError, match="has the maps 0 to"):
        build([*TINY_VIT, "out_indices=99"])


@needs_timm
@pytest.mark.parametrize("spec, what, trained", [
    (["timm", "model=test_resnet"], "2", {"layer3", "layer4", "fc"}),
    ([*TINY_VIT, "out_indices=1,3,5"], "2", {"blocks.4", "blocks.5", "norm", "head"})])
def test_stages_of_timm_can_be_kept(spec, what, trained):
    """The stem and two stages have no gradient and stay in evaluation mode."""
    student = build(spec)
    Distiller(student, {}, {}, freeze=what).train()
    modules = dict(student.named_modules())
    assert {name for name, parameter in student.named_parameters() if parameter.requires_grad} == {
        name for name, _ in student.named_parameters()
        if any(f"{name}.".startswith(f"{place}.") for place in trained)}
    assert all(modules[name].training for name in trained)
    kept = {name.rpartition(".")[0] for name, parameter in student.named_parameters()
            if not parameter.requires_grad} - {""}
    assert kept and not any(modules[name].training for name in kept)


@needs_timm
def test_blocks_that_timm_does_not_name():
    student = build(["timm", "model=pit_ti_224"])
    with pytest.raises(UserError, match="does not name the blocks of pit_ti_224"):
        student.parts()


@needs_timm
def test_published_weights_come_from_the_library(monkeypatch):
    """Fetched at their own number of classes: a teacher's are cut, a student's head starts anew."""
    import timm
    published = fill_by_name(timm.create_model("test_resnet"))
    monkeypatch.setattr(TimmNetwork, "published_state", lambda self: published.state_dict())
    wnids = imagenet_wnids()[5:8]
    spec = ["timm", "model=test_resnet"]
    teacher = load_teacher(spec, "published", None, wnids).eval()
    student = load_student(spec, "published", None, wnids).eval()
    images = random_images(1, 64)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), published.eval()(images)[:, 5:8])
        assert student(images).shape == (1, 3)
        assert torch.equal(student.layer1[0].conv1.weight, published.layer1[0].conv1.weight)


@needs_timm
def test_batch_norms_with_an_activation_keep_it_when_synchronised():
    model = fill_by_name(build(["timm", "model=test_byobnet"]))
    images = random_images(1, 64)
    with torch.no_grad():
        expected = model(images)
        model.synchronise_batch_norms()
        assert torch.equal(model(images), expected)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) > 5

    class Louder(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = create_model("resnet_nano", 7)
    model.bn1 = Louder(16)
    with pytest.raises(UserError, match="bn1 is a Louder"):
        model.synchronise_batch_norms()


@needs_timm
def test_analysis_takes_networks_of_libraries():
    model = build(["timm", "model=test_convnext"])
    assert contributions(model.requires_grad_(False), random_images(1, 64)).gt(0).any()
    assert meta_model(["timm", "model=test_convnext"], 7).head.fc.weight.is_meta


# Sentences


@needs_timm
@pytest.mark.parametrize("words, sentence", [
    ("timm model=convnextv2_ato", "no model 'convnextv2_ato'. The nearest: convnextv2_atto"),
    ("timm", "timm needs the option model=NAME"),
    ("timm model=resnet18.a9_in1k", "no weights 'a9_in1k' of resnet18; its own are resnet18.a1"),
    ("timm model=resnet18 pretrained=true", "pretrained is set by the program"),
])
def test_wrong_names_of_timm(words, sentence):
    with pytest.raises(UserError) as caught:
        check_spec(words.split(), "--teacher")
    assert sentence in str(caught.value)


@pytest.mark.parametrize("words, sentence", [
    ("torchvision model=regnet_y_400fm", "The nearest: regnet_y_400mf"),
    ("torchvision model=resnet18 weights=V3", "its own are IMAGENET1K_V1, DEFAULT"),
    ("torchvision", "torchvision needs the option model=NAME"),
    ("my_model:build", "no module 'my_model' in "),
    ("os:system command=true", "no module 'os' in "),
    ("my_model:", "no module 'my_model' in "),
])
def test_other_wrong_names(words, sentence):
    with pytest.raises(UserError) as caught:
        check_spec(words.split(), "--teacher")
    assert sentence in str(caught.value)


@needs_timm
def test_an_option_that_the_network_does_not_have():
    with pytest.raises(UserError, match="timm model=test_resnet: .*'layers_of_cake'"):
        build(["timm", "model=test_resnet", "layers_of_cake=3"])


def test_without_timm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)  # what an import of nothing finds
    assert train_kd.main(["--teacher", "timm", "model=resnet18", "--data-set", "outlines"]) == 2
    assert "need the package timm" in capsys.readouterr().err


@needs_timm
def test_weights_that_timm_does_not_have():
    model = build(TINY_VIT)
    for key in ("url", "hf_hub_id", "file"):
        model.network.pretrained_cfg[key] = None
    with pytest.raises(UserError, match="timm has no published weights of test_vit"):
        model.published_state()


# Networks of the user's own


OWN = '''
from torch import nn
from models.base import FeatureInfo, ModelOutput, VisionModel


def build(num_classes=10, width=8):
    return nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(width, num_classes))


class Maps(VisionModel):
    def __init__(self, num_classes):
        super().__init__()
        self.num_classes, self.feature_info = num_classes, (FeatureInfo(8, 8),)
        self.stem, self.head = nn.Conv2d(3, 8, 8, stride=8), nn.Linear(8, num_classes)

    def forward_with_features(self, images):
        x = self.stem(images)
        return ModelOutput(self.head(x.mean((2, 3))), [x])


def maps_only():
    return nn.Conv2d(3, 8, 8)


def number():
    return 3


def broken():
    return 1 / 0
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    yield name
    sys.modules.pop(name, None)


def test_own_function(own):
    model = build([f"{own}:build", "width=16"])
    assert model.num_classes == 7 and model.feature_info == ()
    assert [*model.state_dict()] == ["0.weight", "0.bias", "4.weight", "4.bias"]
    images = random_images(2, 32)
    assert torch.equal(model(images), model.network(images))
    assert model.count_macs(32) == 16 * (3 * 64 * 16 + 7)
    assert build([f"{own}:Maps"]).feature_info == ((8, 8),)


@pytest.mark.parametrize("words, sentence", [
    ("build widht=3", "unknown option 'widht'.*Did you mean 'width'"),
    ("build num_classes=3", "num_classes is set by the program"),
    ("maps_only", r"gives \(1, 8, 217, 217\), expected logits \(N, classes\)"),
    ("number", "gives a int, expected an nn.Module"),
    ("broken", "division by zero .*own_.*py:"),
    ("nothing", "defines no function 'nothing'"),
    ("FeatureInfo", "defines no function 'FeatureInfo'"),  # imported there
])
def test_own_function_that_is_wrong(own, words, sentence):
    with pytest.raises(UserError, match=sentence):
        build(f"{own}:{words}".split())


def test_own_network_teaches_by_logits_and_trains(own, tmp_path, capsys):
    common = ["--data-set", "outlines", "train_size=16", "val_size=8", "--input-size", "32",
              "--batch-size", "8", "--effective-batch", "8", "--epochs", "1", "--warmup-epochs",
              "0", "--num-workers", "0", "--device", "cpu", "--teacher-weights", "random",
              "--teacher", f"{own}:build", "--student", f"{own}:Maps"]
    assert train_kd.main([*common, "--loss", "ce", "--loss", "fd"]) == 2
    assert "the teacher does not say which it has" in capsys.readouterr().err
    assert train_kd.main([*common, "--output-dir", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "checkpoint-last.pth"
    assert load_trained(path).settings["student"] == [f"{own}:Maps"]


# Teachers without a classifier


@pytest.fixture
def headless(tmp_path):
    """A file of the weights of resnet_nano, but for its classifier."""
    state = fill_by_name(create_model("resnet_nano", 10)).state_dict()
    path = tmp_path / "headless.pth"
    torch.save({name: value for name, value in state.items() if not name.startswith("fc.")}, path)
    return str(path)


def test_a_headless_teacher_gives_maps_alone(headless):
    model = load_teacher(["resnet_nano"], headless, None, [*"abc"], needs_logits=False)
    teacher = FrozenTeacher(model, IMAGENET_MEAN, IMAGENET_STD)
    output = teacher.forward_with_features(random_images(6, 64))  # in parts, on a CPU
    assert output.logits is None and teacher.num_classes == 0
    assert [tuple(feature.shape) for feature in output.features] == [
        (6, 16, 16, 16), (6, 32, 8, 8), (6, 64, 4, 4), (6, 128, 2, 2)]
    assert teacher(random_images(6, 64)) is None
    assert teacher_metrics(torch.zeros(6, 3), output.logits, torch.zeros(6)) == {}
    with pytest.raises(UserError, match="has no classifier, and a loss needs its logits"):
        load_teacher(["resnet_nano"], headless, None, [*"abc"])


def test_a_headless_teacher_teaches(headless, tmp_path, capsys):
    common = ["--data-set", "outlines", "train_size=16", "val_size=8", "--input-size", "32",
              "--batch-size", "8", "--effective-batch", "8", "--epochs", "1", "--warmup-epochs",
              "0", "--num-workers", "0", "--device", "cpu", "--teacher", "resnet_nano",
              "--teacher-weights", headless, "--student", "convnext_nano"]
    assert train_kd.main([*common, "--loss", "nkd"]) == 2
    assert capsys.readouterr().err.count("has no classifier, and a loss needs its logits") == 1
    assert train_kd.main([*common, "--loss", "ce", "--loss", "fd",
                          "--output-dir", str(tmp_path / "run")]) == 0
    assert "not evaluated, for it has no classifier" in capsys.readouterr().out
    line = (tmp_path / "run" / "log.txt").read_text()
    assert '"train_fd"' in line and '"teacher_acc1": null' in line and "agreement" not in line
