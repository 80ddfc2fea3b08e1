"""CKA against its definition and known answers; what predictions share; the command."""
import csv
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

import models
from analysis.similarity import MinibatchCKA, PredictionSums, gram, main, overlap, unbiased_hsic
from utils.registry import UserError


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cka(first: torch.Tensor, second: torch.Tensor, batch_size: int = 32) -> float:
    alignment = MinibatchCKA(1, 1)
    for left, right in zip(first.split(batch_size), second.split(batch_size)):
        alignment.add([gram(left)], [gram(right)])
    return alignment.value().item()


def test_hsic_is_the_mean_over_all_quadruples():
    """Its definition as a U-statistic (Song et al. 2012), term by term."""
    first, second = (gram(noise(6, 5, seed=seed)) for seed in (0, 1))
    terms = [first[i, j] * (second[i, j] + second[q, r] - 2 * second[i, q])
             for i, j, q, r in itertools.permutations(range(6), 4)]
    torch.testing.assert_close(unbiased_hsic(first, second), torch.stack(terms).mean())


def test_hsic_does_not_see_a_shift_of_the_features():
    feature, other = noise(8, 5), noise(8, 5, seed=1)
    product = (feature @ feature.T).double().fill_diagonal_(0)  # without the mean taken off
    torch.testing.assert_close(unbiased_hsic(product, gram(other)),
                               unbiased_hsic(gram(feature), gram(other)), rtol=1e-4, atol=1e-6)


def test_a_map_with_itself_is_1():
    feature = noise(64, 6, 3, 3)
    assert cka(feature, feature) == pytest.approx(1, abs=1e-12)


def test_a_rotated_scaled_and_moved_copy_is_1():
    feature = noise(64, 54)
    rotation = torch.linalg.qr(noise(54, 54, seed=1)).Q
    assert cka(feature, 3 * feature @ rotation + 5) == pytest.approx(1, abs=1e-5)
    assert cka(feature, feature * torch.linspace(0, 3, 54)) < 0.95  # no rotation


def test_independent_noise_is_near_0_whatever_the_batches():
    """The biased estimate would be far above 0 where there are more channels than images."""
    first, second = noise(2048, 200), noise(2048, 200, seed=1)
    for batch_size in (16, 64):
        assert abs(cka(first, second, batch_size)) < 0.03
    centred = [feature[:16] - feature[:16].mean(0) for feature in (first, second)]
    grams = [feature @ feature.T for feature in centred]
    assert (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm()) > 0.8


def test_the_estimate_does_not_depend_on_the_batch_size():
    feature = noise(4096, 20)
    other = feature + 2 * noise(4096, 20, seed=1)
    small, large = (cka(feature, other, batch_size) for batch_size in (8, 256))
    assert small == pytest.approx(large, abs=0.02) and 0.1 < large < 0.5


def test_a_map_that_never_changes_has_no_cka():
    assert np.isnan(cka(torch.ones(32, 4), noise(32, 4)))


def test_overlap_counts_common_classes():
    first = torch.tensor([[9., 8, 7, 6, 5, 0, 0.1], [1, 2, 3, 4, 5, 6, 7]])
    other = torch.tensor([[9., 0, 7, 6, 5, 8, 0.1], [7, 6, 5, 4, 3, 2, 1]])
    assert overlap(first, other, 1).tolist() == [1, 0]
    assert overlap(first, other, 5).tolist() == pytest.approx([0.8, 0.6])
    assert overlap(first[:, :2], other[:, :2], 5).tolist() == [1, 1]


def test_predictions_by_hand():
    first, other = torch.log(torch.tensor([[0.7, 0.3], [0.2, 0.8]])), torch.log(
        torch.tensor([[0.6, 0.4], [0.9, 0.1]]))
    sums = PredictionSums()
    sums.add(first[:1], other[:1])
    sums.add(first[1:], other[1:])
    means = sums.means()
    p, q = first.exp().double().numpy(), other.exp().double().numpy()
    assert means["agreement@1"] == 50 and means["agreement@5"] == 100
    assert means["KL(first, other)"] == pytest.approx((p * np.log(p / q)).sum() / 2)
    assert means["KL(other, first)"] == pytest.approx((q * np.log(q / p)).sum() / 2)


# The command


@pytest.fixture
def weights(tmp_path):
    paths = []
    for name in ("convnext_bn_pico", "slak_pico"):
        torch.manual_seed(0)
        paths.append(tmp_path / f"{name}.pth")
        torch.save(models.create_model(name, 10).state_dict(), paths[-1])
    return paths


def command(weights, out, *more: str) -> list[str]:
    words = [word for path in weights for word in ("--model", path.stem, "--weights", str(path))]
    return [*words, "--num-classes", "10", "--data-set", "outlines", "val_size=21", "--input-size",
            "32", "--batch-size", "8", "--num-workers", "0", "--out", str(out), *more]


def table(out) -> list[dict[str, str]]:
    with open(out / "similarity.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_compares_the_first_with_each_of_the_others(weights, tmp_path, capsys):
    out = tmp_path / "similarity"
    words = command([weights[0], *weights], out, "--labels", "one", "same", "other")
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert (out / "similarity.md").read_text() in shown
    assert "| one | same | 1 | 21 | 100.00 | 100.00 | 0.0000 | 0.0000 |" in shown
    rows = table(out)
    assert len(rows) == 2 * (4 + 2 * 2)
    by_stage = {(row["other"], row["first_stage"], row["other_stage"]): float(row["value"])
                for row in rows if row["quantity"] == "CKA"}
    assert by_stage["same", "1", "1"] == by_stage["same", "2", "2"] == pytest.approx(1)
    assert by_stage["same", "1", "2"] < 1 and by_stage["other", "1", "1"] < 1
    # The last batch has five images: counted in what is predicted, not in CKA.
    assert {row["images"] for row in rows if row["quantity"] == "CKA"} == {"16"}
    assert {row["images"] for row in rows if row["quantity"] != "CKA"} == {"21"}
    assert np.load(out / "cka-2.npy")[0, 1] == by_stage["other", "1", "2"]
    pytest.importorskip("matplotlib")
    with Image.open(out / "similarity.png") as plot:
        assert len(plot.convert("RGB").getcolors(10 ** 6)) > 50


def test_networks_of_one_name_are_seeds_of_one(weights, tmp_path, capsys):
    out = tmp_path / "similarity"
    torch.manual_seed(5)
    torch.save(models.create_model("slak_pico", 10).state_dict(), tmp_path / "second.pth")
    words = command(weights, out, "--model", "slak_pico", "--weights", str(tmp_path / "second.pth"))
    assert main([*words, "--labels", "one", "seeds", "seeds"]) == 0
    shown = capsys.readouterr().out
    rows = [row for row in table(out) if row["quantity"] == "agreement@5"]
    assert [(row["other"], row["group"]) for row in rows] == [
        ("seeds", "seeds"), ("seeds (2)", "seeds")]
    values = [float(row["value"]) for row in rows]
    assert values[0] != values[1]
    assert f"| {np.mean(values):.2f} +- {np.std(values, ddof=1):.2f} |" in shown
    cka = np.mean([np.load(out / f"cka-{number}.npy") for number in (1, 2)], axis=0)
    assert f"| {cka[0, 0]:.3f} | {cka[0, 1]:.3f} |" in shown
    words = command([*weights, weights[0]], tmp_path / "no", "--labels", "one", "two", "two")
    assert main(words) == 2 and not (tmp_path / "no").exists()
    assert "calls different networks 'two'" in capsys.readouterr().err


def test_other_classes_are_not_compared(weights, tmp_path, capsys):
    torch.save(models.create_model("slak_pico", 7).state_dict(), tmp_path / "seven.pth")
    save_trained("convnext_bn_pico", 10, tmp_path / "ten" / "checkpoint-last.pth")
    save_trained("slak_pico", 7, tmp_path / "seven" / "checkpoint-last.pth", called="kind")
    words = command([], tmp_path / "out", "--checkpoint", *(
        str(tmp_path / name / "checkpoint-last.pth") for name in ("ten", "seven")))
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "| ten | seven | 1 | 21 | - | - | - | - |" in shown and "have other classes" in shown
    assert {row["quantity"] for row in table(tmp_path / "out")} == {"CKA"}


def save_trained(name: str, num_classes: int, path, called: str = "class", **changes) -> None:
    path.parent.mkdir()
    torch.manual_seed(len(str(path)))
    model = models.create_model(name, num_classes)
    settings = {"student": [name], "num_classes": num_classes, "data_set": ["outlines"],
                "input_size": 64, "crop_pct": None, **changes}
    torch.save({"model": model.state_dict(), "args": settings,
                "classes": [f"{called} {i}" for i in range(num_classes)]}, path)


def test_equal_numbers_of_other_classes_are_other_classes(tmp_path, capsys):
    save_trained("slak_pico", 10, tmp_path / "one" / "checkpoint-last.pth")
    save_trained("slak_pico", 10, tmp_path / "other" / "checkpoint-last.pth", "kind")
    words = command([], tmp_path / "out", "--checkpoint", *(
        str(tmp_path / name / "checkpoint-last.pth") for name in ("one", "other")))
    assert main(words) == 0
    assert "| one | other | 1 | 21 | - | - | - | - |" in capsys.readouterr().out


def test_the_run_of_the_first_says_how_images_are_shown(tmp_path, capsys):
    for name, size in (("one", 48), ("other", 64)):
        save_trained("slak_pico", 10, tmp_path / name / "checkpoint-last.pth", input_size=size,
                     crop_pct=0.5)
    checkpoints = [str(tmp_path / name / "checkpoint-last.pth") for name in ("one", "other")]
    words = ["--checkpoint", *checkpoints, "--data-set", "outlines", "val_size=21", "--batch-size",
             "8", "--num-workers", "0"]
    assert main([*words, "--out", str(tmp_path / "default")]) == 0
    assert "21 images at 48 px" in capsys.readouterr().out
    assert main([*words, "--input-size", "48", "--crop-pct", "0.5", "--out",
                 str(tmp_path / "same")]) == 0
    assert main([*words, "--crop-pct", "0.9", "--out", str(tmp_path / "crop")]) == 0
    assert table(tmp_path / "default") == table(tmp_path / "same") != table(tmp_path / "crop")


def test_every_network_gets_its_own_normalisation(tmp_path):
    torch.manual_seed(0)
    torch.save(models.create_model("vit_nano", 10).state_dict(), tmp_path / "vit.pth")
    words = ["--num-classes", "10", "--data-set", "outlines", "val_size=8", "--batch-size", "8",
             "--num-workers", "0", "--out", str(tmp_path / "out")]
    for option in ("imagenet", "half"):
        words += ["--model", "vit_nano", f"input_norm={option}", "--weights",
                  str(tmp_path / "vit.pth")]
    assert main(words) == 0
    (value,) = [float(row["value"]) for row in table(tmp_path / "out") if row["quantity"] == "CKA"]
    assert value < 0.9999


def test_batches_are_of_many_classes(tmp_path, monkeypatch):
    """The folders are sorted by class; CKA within a class would be another value."""
    seen = []

    def compare(networks, loader, *rest):
        seen.append(loader.samples.source.indices)
        raise UserError("seen")

    monkeypatch.setattr("analysis.similarity.compare", compare)
    words = ["--model", "slak_pico", "--weights", "random"] * 2
    assert main([*words, "--num-classes", "10", "--data-set", "outlines", "val_size=90",
                 "--input-size", "32", "--images", "64", "--out", str(tmp_path)]) == 2
    assert sorted(seen[0]) == [*range(64)] and sum(index < 8 for index in seen[0][:8]) < 4


def test_unreadable_images_are_left_out(weights, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.RandomState(i).randint(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "val" / name / f"{i}.png")
    (tmp_path / "val" / "a" / "3.png").write_bytes(b"nothing")
    words = command(weights, tmp_path / "out", "--data-path", str(tmp_path), "--skip-bad-images",
                    "--batch-size", "4")
    start = words.index("--data-set")
    words[start + 1:start + 3] = ["imagefolder"]
    assert main(words) == 0
    rows = table(tmp_path / "out")
    assert {row["images"] for row in rows if row["quantity"] == "CKA"} == {"8"}
    assert {row["images"] for row in rows if row["quantity"] != "CKA"} == {"11"}
    assert main([*words, "--batch-size", "12", "--overwrite"]) == 2
    assert "no batch of 12 images without an unreadable one" in capsys.readouterr().err
    assert main([*words, "--data-path", str(tmp_path / "val" / "a")]) == 2


def test_the_flags_matter(weights, tmp_path):
    assert main(command(weights, tmp_path / "base")) == 0
    base = table(tmp_path / "base")
    assert main(command(weights, tmp_path / "first", "--images", "16")) == 0
    assert main(command(weights, tmp_path / "spread", "--images", "16", "--spread")) == 0
    assert table(tmp_path / "first") != table(tmp_path / "spread")
    for number, words in enumerate(("--images 16", "--input-size 48",
                                    "--crop-pct 0.9", "--batch-size 10")):
        out = tmp_path / str(number)
        assert main(command(weights, out, *words.split())) == 0
        assert table(out) != base, words
    assert main(command(weights, tmp_path / "base")) == 2  # nothing is overwritten unasked
    assert main(command(weights, tmp_path / "base", "--overwrite")) == 0


@pytest.mark.parametrize("words, telling", [
    ("--model slak_pico --weights random", "two networks at least are compared; got 1"),
    ("--batch-size 3", "--batch-size must be at least 4"),
    ("--images 2", "--images must be at least 4"),
    ("--model slak_pico --weights random --model slak_pico --weights random --input-size 0",
     "--input-size must be at least 1"),
    ("--model slak_pico --weights random --model slak_t --weights random --input-size 16",
     "--input-size 16 is below one cell of slak_t"),
    ("--model slak_pico --weights random --model slak_pico --weights random --data-set outlines "
     "val_size=3", "CKA needs 4 validation images at least; there are 3"),
    ("--model slak_pico --weights random --model slak_pico --weights random --data-set outlines "
     "--crop-pct 0", "crop_pct is 0"),
    ("--num-workers -1", "--num-workers must be at least 0")])
def test_wrong_words_get_a_sentence(tmp_path, capsys, words, telling):
    assert main([*words.split(), "--out", str(tmp_path / "out")]) == 2
    assert telling in capsys.readouterr().err and not (tmp_path / "out").exists()
