import pytest
import torch

from peco_ds.evaluation.knn import knn_top1


def rows(features):
    return lambda index: features[index]


def naive_top1(train, train_labels, val, val_labels, k, temperature, num_classes):
    """One image after the other, in float64."""
    hits = 0
    for image, truth in zip(val.double(), val_labels):
        similarity = torch.nn.functional.cosine_similarity(image[None], train.double())
        nearest = similarity.argsort(descending=True)[:k]
        votes = [
            sum(float((similarity[i] / temperature).exp()) for i in nearest if train_labels[i] == label)
            for label in range(num_classes)
        ]
        hits += int(max(range(num_classes), key=votes.__getitem__) == truth)
    return 100 * hits / len(val)


@pytest.fixture(scope="module")
def clouds():
    """Five overlapping clouds of points of very different lengths."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=draw)

    def cloud(number):
        labels = torch.randint(5, (number,), generator=draw)
        lengths = torch.rand(number, 1, generator=draw) * 10 + 0.1
        return (centres[labels] + 1.5 * torch.randn(number, 16, generator=draw)) * lengths, labels

    return *cloud(203), *cloud(97)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("chunk", [7, 50, 4096])
def test_neighbours_vote_as_in_a_plain_loop_whatever_the_chunks(clouds, chunk, temperature):
    train, train_labels, val, val_labels = clouds
    found = knn_top1(
        rows(train),
        train_labels,
        rows(val),
        val_labels,
        ks=(1, 5, 20),
        temperature=temperature,
        num_classes=5,
        device=torch.device("cpu"),
        chunk=chunk,
    )
    expected = {k: naive_top1(train, train_labels, val, val_labels, k, temperature, 5) for k in (1, 5, 20)}
    assert found == pytest.approx(expected)
    assert 30 < found[20] < 100, "the clouds overlap, so neither chance nor perfection"


def test_more_neighbours_than_images_are_all_images(clouds):
    train, train_labels, val, val_labels = clouds
    found = knn_top1(
        rows(train[:9]),
        train_labels[:9],
        rows(val),
        val_labels,
        ks=(9, 500),
        temperature=0.07,
        num_classes=5,
        device=torch.device("cpu"),
    )
    assert found[500] == found[9]


def test_a_tiny_temperature_is_the_nearest_neighbour_and_does_not_overflow(clouds):
    train, train_labels, val, val_labels = clouds
    found = knn_top1(
        rows(train),
        train_labels,
        rows(val),
        val_labels,
        ks=(1, 20),
        temperature=1e-4,
        num_classes=5,
        device=torch.device("cpu"),
    )
    # two almost equally near ones may still share a vote
    assert found[20] == pytest.approx(found[1], abs=2.1)
