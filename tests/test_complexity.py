"""Counts of parameters and multiply-accumulates, dense and sparse, against the published ones."""
import pytest
import torch

from analysis.complexity import (
    count_layers,
    count_nonzero,
    expected_nonzero,
    main,
    meta_model,
)
from models import create_model, list_models

MILLION = 1e6


def totals(spec: list[str], sparsity: float = 0.0, input_size: int = 224) -> tuple:
    """Parameters, nonzero parameters, MACs, MACs of nonzero weights."""
    model = meta_model(spec, 1000)
    layers = count_layers(model, input_size, expected_nonzero(model, sparsity, "uniform"))
    return tuple(sum(column) for column in list(zip(*layers))[2:])


@pytest.mark.parametrize("spec, nonzero", [
    (["slak_t"], 30.473), (["slak_t", "kernel_size=31,29,27,13,5"], 29.800),
    (["slak_t", "kernel_size=61,59,57,13,5"], 30.810), (["slak_t", "width_factor=1.0"], 18.529),
    (["slak_s"], 54.780), (["slak_b"], 94.905), (["slak_l"], 208.177)])
def test_nonzero_parameters_at_40_percent_are_the_published_ones(spec, nonzero):
    parameters, live, _, _ = totals(spec, 0.4)
    assert round(live / MILLION, 3) == nonzero
    assert parameters == meta_model(spec, 1000).num_parameters


@pytest.mark.parametrize("spec, input_size, giga", [
    (["convnext_t"], 224, 4.456), (["slak_t"], 224, 8.705), (["slak_b"], 384, 83.779),
    (["slak_t", "kernel_size=31,29,27,13,5"], 224, 8.178)])
def test_dense_multiply_accumulates_are_the_published_ones(spec, input_size, giga):
    _, _, macs, sparse_macs = totals(spec, input_size=input_size)
    assert round(macs / 1e9, 3) == giga and sparse_macs == macs


@pytest.mark.parametrize("input_size, giga", [(224, 17.1), (384, 50.3)])
def test_slak_b_at_40_percent(input_size, giga):
    *_, macs, sparse_macs = totals(["slak_b"], 0.4, input_size)
    assert round(sparse_macs / 1e9, 1) == giga
    assert sparse_macs / macs == pytest.approx(0.6, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in list_models() if name.endswith("_nano")])
def test_layers_add_up_to_the_whole(name):
    model = meta_model([name], 10)
    layers = count_layers(model, 224, {})
    assert sum(layer.macs for layer in layers) == model.count_macs(224)
    assert sum(layer.parameters for layer in layers) == model.num_parameters
    assert len({layer.name for layer in layers}) == len(layers)


def test_a_layer_by_hand():
    model = create_model("slak_pico", 10)
    with torch.no_grad():
        model.stages[0][0].pwconv1.weight.view(-1)[::4] = 0
    (layer,) = [layer for layer in count_layers(model, 64, count_nonzero(model))
                if layer.name == "stages.0.0.pwconv1"]
    weights = 48 * 192
    assert (layer.shape, layer.parameters, layer.nonzero) == (
        "192x48", weights + 192, weights * 3 // 4 + 192)
    assert layer.macs == weights * 16 * 16 and layer.sparse_macs == layer.macs * 3 / 4


def test_the_command(capsys, tmp_path):
    assert main(["--model", "slak_pico", "--sparsity", "0.4", "--sparse-init", "erk",
                 "--input-size", "64"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("64 px") and "| stages.1.1.pwconv2 | 96x384 |" in printed
    model = create_model("slak_pico", 1000)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    little = {"student": ["slak_pico"], "num_classes": 1000}  # of a run, by another program
    torch.save({"model": model.state_dict(), "args": little}, tmp_path / "b.pth")
    count = f"{model.num_parameters:,}"
    for words in (["--model", "slak_pico", "--weights", str(tmp_path / "a.pth")],
                  ["--checkpoint", str(tmp_path / "b.pth")]):
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert "224 px" in printed and f"| **total** |  | {count} | {count} |" in printed


@pytest.mark.parametrize("words, telling", [
    (["--model", "slak_pico", "--checkpoint", "x.pth"], "give --checkpoint FILE; or --model"),
    (["--model", "vit_nano", "--input-size", "64"], "takes 224 px only"),
    (["--model", "slak_pico", "--input-size", "0"], "at least 1, got 0"),
    (["--model", "slak_pico", "--weights", "x.pth", "--sparsity", "0.4"], "give --checkpoint"),
    (["--checkpoint", "a.pth", "--sparsity", "0.4"], "give --checkpoint"),
    (["--sparsity", "0.4"], "give --checkpoint"), (["--weights", "x.pth"], "give --checkpoint"),
    (["--model", "slak_pico", "--sparsity", "1"], "must be in [0, 1)"),
    (["--checkpoint", "none.pth"], "no such file"),
    (["--model", "slak_pico", "--input-size", "2"], "does not run at --input-size 2")])
def test_what_cannot_be_counted(words, telling, capsys):
    assert main(words) == 2
    assert telling in capsys.readouterr().err
