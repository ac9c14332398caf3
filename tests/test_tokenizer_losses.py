from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from peco_ds.config import TokenizerLossSettings, TokenizerRecipe, TokenizerSettings
from peco_ds.models.critic import PatchCritic, TokenizerWithCritic
from peco_ds.models.tokenizers import build_tokenizer
from peco_ds.objectives.tokenizer_losses import (
    DistillationObjective,
    TokenizerObjective,
    build_tokenizer_objective,
    cosine_loss,
    hinge_losses,
    perceptual_loss,
    pixel_loss,
    tokenizer_loss,
)
from peco_ds.recipe_files import RECIPES, load_recipe


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_pixel_loss_and_gradient_follow_the_formula(kind):
    reconstruction, target = normal(0, 2, 3, 4, 4).requires_grad_(), normal(1, 2, 3, 4, 4)
    loss = pixel_loss(reconstruction, target, kind)
    loss.backward()
    difference = reconstruction.detach().double().numpy() - target.double().numpy()
    value, slope = {"mse": (difference**2, 2 * difference), "l1": (np.abs(difference), np.sign(difference))}[kind]
    assert loss.item() == pytest.approx(value.mean(), rel=1e-5)
    np.testing.assert_allclose(reconstruction.grad.numpy(), slope / difference.size, rtol=1e-5, atol=1e-8)


def by_formula(features: np.ndarray, normalize: str) -> np.ndarray:
    if normalize == "channel":
        return features / np.sqrt((features**2).sum(axis=-1, keepdims=True))
    if normalize == "layer":
        centred = features - features.mean(axis=-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return features


@pytest.mark.parametrize("normalize", ["channel", "layer", "none"])
def test_perceptual_loss_and_gradient_are_those_of_pecos_equation_5(normalize):
    """Value by NumPy in float64, the gradient by differences of that value."""
    mine = [normal(0, 2, 9, 6).requires_grad_(), normal(1, 2, 4, 8).requires_grad_()]
    target = [normal(2, 2, 9, 6).requires_grad_(), normal(3, 2, 4, 8).requires_grad_()]

    def equation_5(features: list[np.ndarray]) -> float:
        pairs = zip(features, (tensor.detach().double().numpy() for tensor in target))
        return sum(((by_formula(a, normalize) - by_formula(b, normalize)) ** 2).mean() for a, b in pairs)

    loss = perceptual_loss(mine, target, normalize)
    loss.backward()
    values = [tensor.detach().double().numpy() for tensor in mine]
    assert loss.item() == pytest.approx(equation_5(values), rel=1e-5)
    for tensor, value in zip(mine, values):
        for place in ((0, 0, 0), (1, 3, 5), (1, 2, 1)):
            up, down = (
                equation_5(
                    [
                        v + step * (np.arange(v.size) == np.ravel_multi_index(place, v.shape)).reshape(v.shape)
                        if v is value
                        else v
                        for v in values
                    ]
                )
                for step in (1e-6, -1e-6)
            )
            assert tensor.grad[place].item() == pytest.approx((up - down) / 2e-6, rel=2e-3, abs=1e-6)
    assert all(tensor.grad is None for tensor in target)


def test_features_of_length_zero_give_a_finite_gradient():
    mine = torch.zeros(1, 2, 4, requires_grad=True)
    perceptual_loss([mine], [normal(0, 1, 2, 4)], "channel").backward()
    assert mine.grad.isfinite().all()


def test_perceptual_loss_sums_over_blocks_and_averages_within_them():
    mine = [normal(0, 2, 9, 4).requires_grad_(), normal(1, 2, 4, 8).requires_grad_()]
    target = [normal(2, 2, 9, 4).requires_grad_(), normal(3, 2, 4, 8).requires_grad_()]
    loss = perceptual_loss(mine, target, "none")
    loss.backward()
    differences = [(a - b).detach().double().numpy() for a, b in zip(mine, target)]
    assert loss.item() == pytest.approx(sum((d**2).mean() for d in differences), rel=1e-5)
    for tensor, difference in zip(mine, differences):
        np.testing.assert_allclose(tensor.grad.numpy(), 2 * difference / difference.size, rtol=1e-4, atol=1e-8)
    assert all(tensor.grad is None for tensor in target)


def test_cosine_loss_and_gradient_follow_the_formula():
    features, target = normal(0, 2, 5, 7).requires_grad_(), normal(1, 2, 5, 7).requires_grad_()
    loss = cosine_loss(features, target)
    loss.backward()
    mine, other = (tensor.detach().double().numpy() for tensor in (features, target))
    lengths = np.linalg.norm(mine, axis=-1, keepdims=True)
    mine, other = mine / lengths, other / np.linalg.norm(other, axis=-1, keepdims=True)
    cosines = (mine * other).sum(-1, keepdims=True)
    assert loss.item() == pytest.approx((1 - cosines).mean(), rel=1e-5)
    # d/dx of u . t with u = x / |x| is (t - u (u . t)) / |x|
    np.testing.assert_allclose(features.grad.numpy(), -(other - mine * cosines) / lengths / 10, rtol=1e-4, atol=1e-7)
    assert target.grad is None


class Halves:
    """A teacher whose features are the images themselves, cut in two."""

    def targets(self, images_01):
        assert not torch.is_grad_enabled() and images_01.min() >= 0 and images_01.max() <= 1
        return images_01.flatten(1).unflatten(1, (2, -1))


def test_distillation_adds_weighted_commitment_and_shows_the_teacher_images_in_its_own_range():
    images_11 = normal(0, 3, 3, 4, 4).clamp(-1, 1)
    output = SimpleNamespace(
        features=normal(1, 3, 2, 24).bfloat16().requires_grad_(), commitment=torch.tensor(0.5, requires_grad=True)
    )
    loss, stats = DistillationObjective(TokenizerLossSettings(commitment_weight=0.25), Halves())(
        output, images_11, step=0
    )
    distance = cosine_loss(output.features, ((images_11 + 1) / 2).reshape(3, 2, 24))
    torch.testing.assert_close(loss, distance + 0.125)
    assert (
        loss.dtype == torch.float32
        and stats["cosine"].item() == pytest.approx(1 - distance.item())
        and stats["commitment"] == 0.5
    )
    loss.backward()
    assert output.commitment.grad == 0.25 and output.features.grad.abs().sum() > 0
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize(
    "recipe, objective",
    [
        ("peco_tokenizer", TokenizerObjective),
        ("beitv2_tokenizer", DistillationObjective),
        ("beitv2_tokenizer_dino", DistillationObjective),
    ],
)
def test_a_recipe_gets_the_objective_of_its_kind_of_tokenizer(recipe, objective):
    cfg = load_recipe(
        TokenizerRecipe,
        RECIPES / f"{recipe}.yaml",
        ["teacher.weights=x" if recipe.startswith("beitv2") else "perceptual.weights=x"],
        environ={},
    ).recipe
    assert isinstance(build_tokenizer_objective(cfg, Halves()), objective)


def test_hinge_losses_follow_the_formula():
    real, fake = normal(0, 2, 1, 3, 3), normal(1, 2, 1, 3, 3)
    critic, generator = hinge_losses(real, fake, fake)
    expected = 0.5 * (np.maximum(0, 1 - real.numpy()).mean() + np.maximum(0, 1 + fake.numpy()).mean())
    assert critic.item() == pytest.approx(expected, rel=1e-5)
    assert generator.item() == 0.0


def test_sixteen_bit_inputs_are_compared_in_float32():
    reconstruction, target = normal(0, 1, 3, 64, 64).bfloat16(), normal(1, 1, 3, 64, 64).bfloat16()
    assert pixel_loss(reconstruction, target, "mse").item() == pytest.approx(
        (reconstruction.double() - target.double()).square().mean().item(), rel=1e-5
    )
    assert perceptual_loss([reconstruction], [target]).dtype == torch.float32


def test_the_sum_is_weighted_as_the_settings_say():
    output = SimpleNamespace(reconstruction=normal(0, 2, 3, 4, 4), commitment=torch.tensor(2.0))
    images, features = normal(1, 2, 3, 4, 4), ([normal(2, 2, 4, 8)], [normal(3, 2, 4, 8)])
    settings = TokenizerLossSettings(pixel="l1", pixel_weight=3.0, commitment_weight=0.5)
    logits = SimpleNamespace(
        real=normal(4, 2, 1, 2, 2), fake_detached=normal(5, 2, 1, 2, 2), fake=normal(5, 2, 1, 2, 2)
    )
    loss, stats = tokenizer_loss(
        output,
        images,
        settings=settings,
        features_reconstruction=features[0],
        features_target=features[1],
        perceptual_weight=0.7,
        critic_logits=logits,
        adversarial_weight=0.8,
    )
    expected = (
        3.0 * pixel_loss(output.reconstruction, images, "l1")
        + 0.5 * 2.0
        + 0.7 * perceptual_loss(*features)
        + stats["critic"]
    )
    torch.testing.assert_close(loss, expected)
    assert stats.keys() == {"pixel", "commitment", "perceptual", "critic", "generator"}
    assert stats["generator"].item() == pytest.approx(-logits.fake.mean().item())
    assert not any(value.requires_grad for value in stats.values())


def test_what_is_switched_off_is_not_reported():
    output = SimpleNamespace(reconstruction=normal(0, 2, 3, 4, 4), commitment=torch.tensor(2.0))
    _, stats = tokenizer_loss(output, normal(1, 2, 3, 4, 4), settings=TokenizerLossSettings())
    assert stats.keys() == {"pixel", "commitment"}


def adversarial_parts():
    torch.manual_seed(0)
    tokenizer = build_tokenizer(
        TokenizerSettings(channels=8, channel_mults=(1, 2), blocks_per_level=1, z_channels=8, code_dim=8, num_codes=16)
    )
    critic = PatchCritic(8, 2)
    return TokenizerWithCritic(tokenizer, critic).double(), normal(1, 2, 3, 32, 32).clamp(-1, 1).double()


def gradients(module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    return found


def test_one_backward_gives_the_gradients_of_two_optimisers():
    model, images = adversarial_parts()
    settings, weight = TokenizerLossSettings(), 0.8

    joint = model(images)
    loss, _ = tokenizer_loss(
        joint.tokenizer, images, settings=settings, critic_logits=joint.logits, adversarial_weight=weight
    )
    loss.backward()
    together = gradients(model)

    output = model.tokenizer(images)
    plain, _ = tokenizer_loss(output, images, settings=settings)
    (plain - weight * model.critic(output.reconstruction.double()).mean()).backward()
    separate = {name: grad for name, grad in gradients(model).items() if name.startswith("tokenizer.")}
    real, fake = model.critic(images), model.critic(output.reconstruction.detach().double())
    (0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())).backward()
    separate |= {name: p.grad for name, p in model.named_parameters() if name.startswith("critic.")}

    assert together.keys() == separate.keys()
    for name, grad in together.items():
        # Logits and reconstruction are float32 by contract, the rest of this model float64: the tolerance is float32's.
        torch.testing.assert_close(grad, separate[name], rtol=1e-4, atol=1e-7, msg=name)


def test_the_tokenizer_feels_no_critic_at_weight_zero_but_the_critic_learns():
    model, images = adversarial_parts()
    plain, _ = tokenizer_loss(model.tokenizer(images), images, settings=TokenizerLossSettings())
    plain.backward()
    alone = {name: p.grad.clone() for name, p in model.tokenizer.named_parameters()}
    model.zero_grad()
    joint = model(images)
    tokenizer_loss(joint.tokenizer, images, settings=TokenizerLossSettings(), critic_logits=joint.logits)[0].backward()
    for name, p in model.tokenizer.named_parameters():
        torch.testing.assert_close(p.grad, alone[name])
    assert all(p.grad.abs().sum() > 0 for p in model.critic.parameters())


def test_the_critic_judges_an_image_alike_in_any_batch():
    model, images = adversarial_parts()
    torch.testing.assert_close(model.critic(images)[:1], model.critic(images[:1]))


def test_the_critic_has_a_logit_for_each_patch():
    assert PatchCritic(16, 3)(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 6, 6)
