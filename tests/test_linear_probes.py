import pytest
import torch

from peco_ds.config import ProbeSettings
from peco_ds.errors import UserError
from peco_ds.evaluation.linear_probes import linear_accuracy, probe, standardisation, train_linear_probes

CPU = torch.device("cpu")
EPOCHS = 15


def trained(features, labels, *lrs, seed=0):
    settings = ProbeSettings(lrs=lrs, epochs=EPOCHS, global_batch=32, seed=seed)
    return train_linear_probes(rows(features), labels, settings, num_classes=4, device=CPU)


def rows(features):
    return lambda index: features[index]


@pytest.fixture(scope="module")
def clouds():
    """Four clouds of points, on axes whose scales differ by six orders of magnitude."""
    draw = torch.Generator().manual_seed(0)
    centres, scales = torch.randn(4, 12, generator=draw), 10.0 ** torch.linspace(-3, 3, 12)

    def cloud(number):
        labels = torch.randint(4, (number,), generator=draw)
        return (centres[labels] + torch.randn(number, 12, generator=draw)) * scales + 5, labels

    return *cloud(300), *cloud(150)


def test_each_rate_trains_as_if_it_were_alone(clouds):
    train, labels, *_ = clouds
    together = trained(train, labels, 1e-3, 1e-2, 1e-1)
    for place, lr in enumerate((1e-3, 1e-2, 1e-1)):
        alone = trained(train, labels, lr)
        torch.testing.assert_close(together.weight[place], alone.weight[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.bias[place], alone.bias[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together.weight[0], together.weight[2])


def test_a_rate_trains_as_a_linear_layer_under_torchs_adamw_and_cosine(clouds):
    train, labels, *_ = clouds
    found = trained(train, labels, 1e-2)
    layer = torch.nn.Linear(12, 4)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    steps = -(-300 // 32) * EPOCHS
    optimizer = torch.optim.AdamW(
        [{"params": [layer.weight], "weight_decay": 1e-4}, {"params": [layer.bias], "weight_decay": 0.0}], lr=1e-2
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(0)
    unit = (train - train.mean(dim=0)) / train.std(dim=0, correction=0)
    for _ in range(EPOCHS):
        for index in torch.randperm(300, generator=order).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(unit[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(found.weight[0], layer.weight.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.bias[0], layer.bias.detach(), rtol=1e-3, atol=1e-4)


def test_features_that_carry_the_label_beat_features_that_do_not(clouds):
    train, labels, val, val_labels = clouds
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    real, random = (
        linear_accuracy(trained(train, given, 1e-2), rows(val), val_labels)[0] for given in (labels, shuffled)
    )
    assert real["top1"] > 80 and random["top1"] < 50
    assert real["top5"] == 100, "of four classes top-5 is all of them"


def test_accuracy_is_the_share_of_right_answers(clouds):
    train, labels, val, val_labels = clouds
    probes = trained(train, labels, 1e-3, 1e-2)
    answers = probes.logits(val).argmax(dim=2)
    expected = (answers == val_labels[:, None]).double().mean(dim=0) * 100
    assert [row["top1"] for row in linear_accuracy(probes, rows(val), val_labels)] == pytest.approx(
        expected.tolist(), rel=1e-5
    )


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_order(clouds):
    train, labels, *_ = clouds
    first, again = (trained(train, labels, 1e-2) for _ in range(2))
    other = trained(train, labels, 1e-2, seed=1)
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)


def test_standardised_features_have_mean_0_and_deviation_1_and_a_constant_one_becomes_0(clouds):
    train = torch.cat([clouds[0], torch.full((300, 1), 7.3), torch.zeros(300, 1)], dim=1)
    mean, scale = standardisation(rows(train), 300)
    unit = (train - mean) * scale
    torch.testing.assert_close(unit[:, :12].mean(dim=0), torch.zeros(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(unit[:, :12].std(dim=0, correction=0), torch.ones(12), atol=1e-3, rtol=0)
    assert torch.equal(unit[:, 12:], torch.zeros(300, 2))


def test_a_rate_at_which_a_classifier_diverges_gives_no_score(clouds):
    train, labels, val, val_labels = clouds
    settings = ProbeSettings(lrs=(1e-2, 1e37), epochs=2, global_batch=32, knn_k=())
    with pytest.raises(UserError, match=r"probe.lrs 1e\+37: .*not finite"):
        probe((rows(train), labels), (rows(val), val_labels), settings, num_classes=4, device=CPU)
