"""The benchmark measures what it says, at any size; no time is tested."""
import json

import pytest

from analysis.benchmark import main, masking_table

TINY = ["masking", "--model", "slak_pico", "--input-size", "16", "--batch-size", "2", "--repeats",
        "2"]


@pytest.mark.parametrize("words", [[], ["--amp", "bf16", "--growth", "gradient"]])
def test_masking(words, tmp_path, capsys):
    assert main([*TINY, *words, "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    for kind in ("no masks", "masks", "masks that change", "mean at --prune-every 100"):
        assert f"| {kind} |" in printed
    figures = json.loads((tmp_path / "out.json").read_text())
    assert 0 < figures["bytes_per_weight"] <= 1
    assert len(figures["masks"]) == 2 and figures["ratio"] > 0


def test_the_mean_counts_the_change_once():
    seconds = {"no masks": [1.0], "masks": [2.0], "masks that change": [102.0]}
    seconds |= {f"gradients of {kind}": [9.0] for kind in list(seconds)}
    table, ratio = masking_table(seconds, 100)
    assert ratio == pytest.approx((9 + 3) / (9 + 1))
    assert "| masks | 9.000 | 2.000 | 1.100 |" in table


@pytest.mark.parametrize("words, telling", [
    (["masks"], "masking"), (["masking", "--repeats", "0"], "--repeats must be at least 1"),
    (["masking", "--model", "vit_nano", "--input-size", "32"], "takes 224 px only"),
    (["masking", "--batch-size", "1"], "--batch-size must be at least 2"),
    (["masking", "--model", "slak"], "unknown model"),
    (["masking", "--model", "resnet_nano", "--sparsity", "1"], "--sparsity must lie in")])
def test_bad_words(words, telling, capsys):
    assert main(words) == 2
    assert telling in capsys.readouterr().err
