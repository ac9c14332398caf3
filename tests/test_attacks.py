"""Attacks against closed forms, against a plain NumPy implementation, and their promises on any image."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peco_ds.config import ClassifierSettings, ModelSettings
from peco_ds.evaluation.attacks import ATTACKS, AttackSettings, RobustnessSums, attacked, default_step_size
from peco_ds.evaluation.forward import in_precision
from peco_ds.evaluation.pixel_classifier import PixelClassifier
from peco_ds.models.classifier import build_classifier

CPU = torch.device("cpu")
SHAPE = (3, 4, 4)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pixels(seed, number):
    """Images float64 [number, 3, 4, 4] in [0, 1], a fifth of whose values lie on the border."""
    return (draw(seed, number, *SHAPE) * 0.8 + 0.5).clamp(0, 1)


class Linear:
    """Two classes; the gradient's signs are those of the weights' difference, wherever the image is."""

    def __init__(self, seed):
        self.weight = draw(seed, 2, *SHAPE)

    def __call__(self, images):
        return torch.einsum("bchw,kchw->bk", images - 0.5, self.weight)

    def away_from(self, labels):
        return (self.weight[1 - labels] - self.weight[labels]).sign()


class Hidden:
    """One hidden layer under tanh, once in torch and once in NumPy with a gradient by hand."""

    def __init__(self, seed, hidden=7, classes=4):
        self.first, self.second = draw(seed, int(np.prod(SHAPE)), hidden) * 0.3, draw(seed + 1, hidden, classes) * 0.3

    def __call__(self, images):
        return torch.tanh(images.flatten(1) @ self.first) @ self.second

    def gradient(self, image, label):
        """Of the cross-entropy with respect to one image."""
        hidden = np.tanh(image.ravel() @ self.first.numpy())
        logits = hidden @ self.second.numpy()
        share = np.exp(logits - logits.max())
        share /= share.sum()
        share[label] -= 1
        return (((self.second.numpy() @ share) * (1 - hidden**2)) @ self.first.numpy().T).reshape(SHAPE)


def plain_attack(net, image, label, chosen):
    """One image, one step after the other."""
    found, momentum = image.copy(), np.zeros(SHAPE)
    for _ in range(chosen.steps):
        gradient = net.gradient(found, label)
        if chosen.attack == "mim":
            momentum = momentum + gradient / np.abs(gradient).mean()
            gradient = momentum
        found = found + chosen.step_size * np.sign(gradient)
        found = np.minimum(np.maximum(found, image - chosen.epsilon), image + chosen.epsilon)
        found = np.minimum(np.maximum(found, 0), 1)
    return found


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(("steps", "step_size"), ((1, 0.01), (3, 0.01), (9, 0.01)))
def test_on_a_linear_classifier_every_step_goes_the_same_way(attack, steps, step_size):
    net, images, labels = Linear(0), pixels(1, 6), torch.tensor([0, 1, 0, 1, 1, 0])
    found = attacked(net, images, labels, AttackSettings(attack, 0.05, steps, step_size))
    expected = (images + min(steps * step_size, 0.05) * net.away_from(labels)).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_that_of_a_plain_implementation(attack):
    net, images, labels = Hidden(3), pixels(2, 5), torch.tensor([0, 1, 2, 3, 3])
    chosen = AttackSettings(attack, 0.2, 12, 0.07)
    found = attacked(net, images, labels, chosen)
    for row, image, label in zip(found, images, labels):
        np.testing.assert_allclose(row.numpy(), plain_attack(net, image.numpy(), int(label), chosen), atol=1e-12)
    assert not torch.equal(found, attacked(net, images, labels, AttackSettings(attack, 0.2, 11, 0.07)))


def test_momentum_goes_on_where_the_gradient_has_turned():
    """A valley between two slopes: the plain method turns back behind its floor, momentum goes on for one more step."""

    def valley(images):
        height = (images - 0.5).abs().sum(dim=(1, 2, 3))
        return torch.stack([height, torch.zeros_like(height)], dim=1)

    start, labels = torch.full((1, *SHAPE), 0.53, dtype=torch.float64), torch.tensor([0])
    bim, mim = (attacked(valley, start, labels, AttackSettings(name, 0.2, 3, 0.02)) for name in ATTACKS)
    torch.testing.assert_close(bim, torch.full_like(start, 0.51))
    torch.testing.assert_close(mim, torch.full_like(start, 0.47))


@settings(max_examples=60)
@given(
    attack=st.sampled_from(ATTACKS),
    epsilon=st.floats(0, 1),
    steps=st.integers(1, 5),
    step_size=st.floats(0, 2),
    seed=st.integers(0, 1000),
)
def test_no_pixel_moves_by_more_than_epsilon_or_leaves_its_range(attack, epsilon, steps, step_size, seed):
    images, labels = pixels(seed, 3).float(), torch.tensor([0, 2, -1])
    net = Hidden(seed)
    net.first, net.second = net.first.float(), net.second.float()
    before = images.clone()
    found = attacked(net, images, labels, AttackSettings(attack, epsilon, steps, step_size))
    assert torch.equal(images, before) and not found.requires_grad
    # half a unit in the last place of a value in [0, 1]
    assert float((found.double() - images.double()).abs().max()) <= epsilon + 6e-8
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    assert torch.equal(found[2], images[2]), "a row that fills the batch up stays as it is"


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_image_is_attacked_alike_whatever_stands_beside_it(attack):
    net, images, labels = Hidden(5), pixels(4, 4), torch.tensor([0, 1, -1, 3])
    chosen = AttackSettings(attack, 0.1, 6, 0.03)
    together = attacked(net, images, labels, chosen)
    for row in range(4):
        alone = attacked(net, images[row : row + 1], labels[row : row + 1], chosen)
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-12)


def test_steps_are_as_long_as_the_papers_say():
    assert default_step_size("mim", 2 / 255, 20) == pytest.approx(0.1 / 255)
    assert default_step_size("bim", 2 / 255, 20) == pytest.approx(0.25 / 255)
    assert default_step_size("bim", 0.0, 20) == 0


# ------------------------------------------------------------------------------------ a trained classifier

CLASSES, SIDE = 3, 16
MODEL = ModelSettings(image_px=SIDE, patch_px=4, width=24, depth=1, heads=2, layer_scale=1.0, drop_path=0)


def stripes(seed, number):
    """Images [number, 3, 16, 16] with faint stripes across, along or both, under noise; and which."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (number,), generator=generator)
    wave = torch.sin(torch.arange(SIDE) * torch.pi / 2)
    across, along = wave.expand(SIDE, SIDE), wave[:, None].expand(SIDE, SIDE)
    patterns = torch.stack([across, along, (across + along) / 2])
    noise = 0.06 * torch.randn(number, 3, SIDE, SIDE, generator=generator)
    return (0.5 + 0.06 * patterns[labels][:, None] + noise).clamp(0, 1), labels


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    model = build_classifier(MODEL, ClassifierSettings(head_scale=1.0), CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    for step in range(50):
        images, labels = stripes(step, 64)
        loss = torch.nn.functional.cross_entropy(model((images - mean) / std), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return PixelClassifier(model.eval(), image_px=SIDE, mean=MEAN, std=STD, source="stripes")


def measured(classifier, attack, epsilon, *, precision="fp32", steps=5):
    images, labels = stripes(1000, 60)
    # The last rows of the last batch only fill it up.
    images, labels = torch.cat([images, torch.zeros(5, 3, SIDE, SIDE)]), torch.cat([labels, torch.full((5,), -1)])
    forward = in_precision(classifier, precision, CPU, gradients=True)
    chosen = AttackSettings(attack, epsilon, steps, default_step_size(attack, epsilon, steps))
    sums = RobustnessSums(forward, chosen, CLASSES, CPU)
    for part in zip(images.split(13), labels.split(13)):
        sums.add(*part)
    return sums.result()


@pytest.mark.parametrize(("attack", "precision"), (("bim", "fp32"), ("mim", "fp32"), ("mim", "bf16")))
def test_a_trained_classifier_loses_more_the_larger_the_budget(classifier, attack, precision):
    found = [measured(classifier, attack, epsilon, precision=precision) for epsilon in (0.0, 0.01, 0.06)]
    assert all(row["images"] == 60 and row["clean"] == found[0]["clean"] for row in found)
    assert found[0]["robust"] == found[0]["clean"], "nothing is changed"
    accuracies = [row["robust"]["top1"] for row in found]
    # Three classes: an attack that steps over a boundary and back leaves about one image in three as it was.
    assert accuracies[0] > 90 and accuracies[0] > accuracies[1] > accuracies[2] and accuracies[2] < 60


def test_more_steps_do_more_harm_than_one(classifier):
    one, five = (measured(classifier, "mim", 0.03, steps=steps)["robust"]["top1"] for steps in (1, 5))
    assert five <= one < 100


def test_gradients_reach_the_images_alone(classifier):
    measured(classifier, "mim", 0.01)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in classifier.parameters())


def test_a_result_tells_the_attack_and_what_was_judged(classifier):
    found = measured(classifier, "bim", 0.01)
    assert found.keys() == {"attack", "epsilon", "steps", "step_size", "judged", "clean", "robust", "images"}
    assert (found["attack"], found["epsilon"], found["steps"]) == ("bim", 0.01, 5)
    assert found["step_size"] == pytest.approx(0.005) and found["clean"].keys() == {"top1", "top5"}


def test_images_of_another_size_are_resized_and_stay_in_range(classifier):
    images, labels = stripes(7, 40)
    larger = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    seen = []
    handle = classifier.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        answers = classifier(larger).argmax(dim=1)
    handle.remove()
    assert seen[0].shape == images.shape and float((answers == labels).double().mean()) > 0.8
    back = seen[0] * classifier.std + classifier.mean
    assert float(back.min()) >= -1e-6 and float(back.max()) <= 1 + 1e-6
