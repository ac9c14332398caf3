import torch

from peco_ds.evaluation.code_probes import bag_of_codes, mean_code_vector

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
