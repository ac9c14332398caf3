import pytest
import torch

from peco_ds.evaluation.code_probes import bag_of_codes, mean_code_vector, probe_codes

CPU = torch.device("cpu")
CODES = torch.tensor([[0, 0, 3, 3], [1, 1, 1, 1], [2, 0, 3, 1]], dtype=torch.int32)


def test_a_bag_counts_codes_wherever_they_lie_and_has_length_1():
    rows = bag_of_codes(CODES, 5, CPU)
    expected = torch.tensor([[0.5, 0, 0, 0.5, 0], [0, 1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25, 0]]).sqrt()
    torch.testing.assert_close(rows(torch.tensor([0, 1, 2])), expected)
    torch.testing.assert_close(rows(torch.tensor([2])).norm(dim=1), torch.ones(1))
    moved = bag_of_codes(CODES[:, torch.tensor([3, 1, 0, 2])], 5, CPU)
    torch.testing.assert_close(moved(torch.tensor([2, 0])), rows(torch.tensor([2, 0])))


def test_the_mean_vector_is_that_of_the_images_codes():
    vectors = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    rows = mean_code_vector(CODES, vectors, CPU)
    torch.testing.assert_close(rows(torch.tensor([1, 0])), torch.stack([vectors[1], (vectors[0] + vectors[3]) / 2]))


class Alone:
    """One rank."""

    rank, size, device = 0, 1, CPU

    def gather_objects(self, value):
        return [value]


def drawn_codes(number, seed, *, of_class):
    """Codes [number, 16] of 3 classes, each of which has favourite codes among 12, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 3
    codes = torch.multinomial(of_class[labels], 16, replacement=True, generator=generator)
    return codes.int(), labels


def probed(vectors, *, num_val=150):
    of_class = torch.full((3, 12), 1.0)
    for label in range(3):
        of_class[label, 4 * label : 4 * label + 4] = 4.0
    train, val = drawn_codes(150, 0, of_class=of_class), drawn_codes(num_val, 1, of_class=of_class)
    return probe_codes(vectors, train, val, 3, Alone())


def test_the_papers_number_is_the_best_linear_classifier_of_the_mean_vector():
    vectors = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    found = probed(vectors, num_val=147)
    mean = found["images_as"]["mean code vector"]
    assert found["mean code vector, linear"] in mean["linear"]
    assert (
        found["mean code vector, linear"]["top1"] == mean["best_linear"] == max(row["top1"] for row in mean["linear"])
    )
    assert [row["penalty"] for row in mean["linear"]] == list(found["settings"]["penalties"]["mean code vector"])
    count = mean["best_linear"] * 147 / 100
    assert count == pytest.approx(round(count), abs=1e-4) and mean["best_linear"] > 80, "of all images to measure on"


def test_vectors_without_meaning_are_seen_in_the_mean_alone():
    """Every class has its own codes, but all of a class's vectors are those of the others too."""
    same = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    found = {name: form["best_linear"] for name, form in probed(same)["images_as"].items()}
    assert found["bag of codes"] > 80 and found["mean code vector"] < 50


def test_a_code_that_no_training_image_has_does_no_harm():
    vectors = torch.randn(13, 7, generator=torch.Generator().manual_seed(0))
    vectors[12] = 1e6
    assert probed(vectors)["images_as"]["bag of codes"]["best_linear"] > 80
