"""One way from images to codes for stored and online ones: passes, precision, compilation."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from peco_ds.config import TokenizerSettings, TokenizerVitSettings
from peco_ds.errors import UserError
from peco_ds.models.token_passes import TokenPasses, even_pass_size
from peco_ds.models.tokenizers import build_tokenizer
from peco_ds.schema import NO_CODE

SIZES = dict(channels=16, channel_mults=(1, 1, 2, 2), blocks_per_level=1, z_channels=16, num_codes=256, code_dim=8)
VIT = TokenizerVitSettings(
    image_px=32,
    patch_px=8,
    width=48,
    depth=2,
    heads=3,
    decoder_width=24,
    decoder_depth=1,
    decoder_heads=3,
    target_width=8,
)
KINDS = {
    "vqgan": TokenizerSettings(**SIZES),
    "vqkd": TokenizerSettings(kind="vqkd", vit=VIT, num_codes=256, code_dim=8, l2_normalized=True),
    "vqvit": TokenizerSettings(kind="vqvit", vit=VIT, num_codes=256, code_dim=8, l2_normalized=True),
    "gumbel": TokenizerSettings(kind="gumbel", **SIZES),
    "dvae": TokenizerSettings(kind="dvae", **SIZES | {"attention": False}),
}


@pytest.fixture(params=KINDS)
def tokenizer(request):
    torch.manual_seed(0)
    found = build_tokenizer(KINDS[request.param]).eval()
    # as after training: the codes lie where the features do
    if hasattr(found, "codebook"):
        images = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
        with torch.no_grad():
            found.codebook.init_kmeans(
                found.encode(images).float().flatten(2).transpose(1, 2).reshape(-1, 8),
                5,
                torch.Generator().manual_seed(2),
            )
    return found


@pytest.fixture
def images_11():
    return torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_images_get_the_same_codes_in_passes_as_in_one_piece(tokenizer, images_11):
    passes = TokenPasses(tokenizer, precision="fp32", images=3, compiled=False)
    assert torch.equal(passes.tokenize(images_11), tokenizer.tokenize(images_11))
    in_passes, whole = (
        passes.tokenize_soft(images_11, 5, temperature=0.5),
        tokenizer.tokenize_soft(images_11, 5, temperature=0.5),
    )
    assert torch.equal(in_passes.codes, whole.codes)
    torch.testing.assert_close(in_passes.topk_probs, whole.topk_probs, rtol=1e-3, atol=1e-6)


def test_hard_codes_do_not_depend_on_whether_soft_ones_are_asked_for(tokenizer, images_11):
    for precision in ("fp32", "bf16", "fp16"):
        passes = TokenPasses(tokenizer, precision=precision, images=4, compiled=False)
        assert torch.equal(passes.tokenize(images_11), passes.tokenize_soft(images_11, 2).codes)


def test_a_codebook_is_searched_once_for_hard_and_soft_codes(tokenizer, images_11, monkeypatch):
    if not hasattr(tokenizer, "codebook"):
        calls, last = [], tokenizer.code_logits
        monkeypatch.setattr(tokenizer, "code_logits", lambda outputs: calls.append(len(outputs)) or last(outputs))
    else:
        calls, last = [], tokenizer.codebook._similarity
        monkeypatch.setattr(tokenizer.codebook, "_similarity", lambda rows: calls.append(len(rows)) or last(rows))
    TokenPasses(tokenizer, precision="fp32", images=7, compiled=False).tokenize_soft(images_11, 3)
    assert len(calls) == 1


def test_fp16_rounds_the_network_less_than_bf16(tokenizer, images_11):
    with torch.no_grad():
        exact = tokenizer.trunk(images_11)

    def error(precision):
        passes = TokenPasses(tokenizer, precision=precision, images=4, compiled=False)
        return float((torch.cat(list(passes.outputs(images_11))).float() - exact).abs().max() / exact.abs().max())

    assert 1e-6 < error("fp16") < error("bf16") / 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_an_image_on_which_the_network_is_not_finite_has_no_codes_and_costs_the_others_none(
    tokenizer, images_11, precision, value
):
    """One number of its outputs is enough, since the layers behind may hide it."""
    passes = TokenPasses(tokenizer, precision=precision, images=4, compiled=False)
    expected = passes.tokenize(images_11)
    trunk, seen = passes._trunk, []

    def overflowing(images):
        outputs = trunk(images).clone()
        if not seen:
            outputs[(2, *[0] * (outputs.dim() - 1))] = value
        seen.append(len(images))
        return outputs

    for tokenize in (passes.tokenize, lambda images: passes.tokenize_soft(images, 2).codes):
        passes._trunk = overflowing
        seen.clear()
        codes = tokenize(images_11)
        assert (codes[2] == NO_CODE).all()
        assert torch.equal(codes[[0, 1, *range(3, 7)]], expected[[0, 1, *range(3, 7)]])


def test_a_tokenizer_whose_numbers_are_not_finite_is_refused_where_it_is_measured(tokenizer, images_11):
    trunk = tokenizer.trunk
    tokenizer.trunk = lambda images: torch.cat([trunk(images[:5]), trunk(images[5:]) * float("nan")])
    for tokenize in (tokenizer.tokenize, lambda images: tokenizer.tokenize_soft(images, 2)):
        with pytest.raises(UserError, match="not finite on 2 of 7 images, so they have no codes"):
            tokenize(images_11)


def test_the_search_for_a_code_finds_none_for_what_is_not_finite(tokenizer):
    with torch.no_grad():
        outputs = torch.full_like(tokenizer.trunk(torch.zeros(1, 3, 32, 32)), float("nan"))
        for found in (tokenizer.choose(outputs), tokenizer.choose_soft(outputs, 2).codes):
            assert (found == NO_CODE).all()


def test_in_bf16_the_network_is_rounded_and_the_choice_is_not(tokenizer, images_11):
    seen = {}
    choose, soft = tokenizer.choose, tokenizer.choose_soft
    tokenizer.choose = lambda outputs: seen.setdefault("codes", choose(seen.setdefault("outputs", outputs)))
    passes = TokenPasses(tokenizer, precision="bf16", images=7, compiled=False)
    codes = passes.tokenize(images_11)
    with torch.no_grad():
        exact = tokenizer.trunk(images_11)
    error = (seen["outputs"].float() - exact).abs().max() / exact.abs().max()
    assert 1e-5 < error < 0.1, "the network computed in float32, or nowhere near it"
    assert torch.equal(codes, choose(seen["outputs"].float())), (
        "the choice depends on the outputs' type, not on their values alone"
    )
    probs = soft(seen["outputs"], 4).topk_probs
    assert probs.dtype == torch.float32 and not torch.equal(probs, probs.bfloat16().float())


def test_a_compiled_network_is_compiled_once_whatever_the_number_of_images(tokenizer, images_11, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    passes = TokenPasses(tokenizer, precision="fp32", images=3, compiled=True)
    found = [passes.tokenize(images_11[:number]) for number in (7, 3, 1, 2, 6)]
    assert counter.frame_count == 1
    for number, codes in zip((7, 3, 1, 2, 6), found):
        assert torch.equal(codes, tokenizer.tokenize(images_11[:number]))


@pytest.mark.parametrize(
    "images, at_most, each", [(64, 64, 64), (60, 64, 60), (100, 64, 50), (67, 64, 34), (1, 64, 1), (130, 64, 44)]
)
def test_passes_are_as_equal_as_can_be(images, at_most, each):
    assert even_pass_size(images, at_most) == each
    passes = -(-images // each)
    assert passes == -(-images // at_most) and passes * each - images < passes


def test_a_tokenizer_in_training_mode_is_refused():
    with pytest.raises(AssertionError, match="eval"):
        TokenPasses(build_tokenizer(KINDS["vqgan"]), precision="fp32", images=1, compiled=False)


SWITCHES = torch.backends.cudnn, torch.backends.cuda.matmul


def tf32_allowed():
    return tuple(switch.allow_tf32 for switch in SWITCHES)


def allow_tf32(*allowed):
    for switch, is_allowed in zip(SWITCHES, allowed):
        switch.allow_tf32 = is_allowed


@pytest.fixture
def outside():
    """What the process allows outside; put back at the end."""
    before = tf32_allowed()
    yield True, True
    allow_tf32(*before)


def test_no_layer_that_leads_to_a_code_may_use_tf32(tokenizer, images_11, outside):
    """Whatever the process allows outside, and it is left as it was."""
    allow_tf32(*outside)
    seen = set()
    for module in tokenizer.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(lambda *_: seen.add(tf32_allowed()))
    tokenizer.tokenize(images_11)
    tokenizer.tokenize_soft(images_11, 2)
    TokenPasses(tokenizer, precision="fp32", images=len(images_11), compiled=False).tokenize(images_11)
    assert seen == {(False, False)} and tf32_allowed() == outside
