"""A toy objective, tokenizer and judge, as somebody outside the package would write them; named in PECO_EXTENSIONS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peco_ds.models.feature_nets import FeatureNet
from peco_ds.models.image_tokenizer import CodebookTokenizer
from peco_ds.models.peco_tokenizer import TokenizerOutput
from peco_ds.models.vq import Codebook
from peco_ds.registry import FEATURE_NETS, OBJECTIVES, TOKENIZERS, FeatureNetFamily, ObjectiveKind, TokenizerKind
from peco_ds.schema import IGNORED


def smooth(settings):
    def objective(outputs, targets):
        logits, codes = outputs.logits.flatten(0, 1).float(), targets.codes.flatten()
        loss = F.cross_entropy(logits, codes, label_smoothing=settings.option("amount"), ignore_index=IGNORED)
        return loss, {"tokens/spread": logits.detach().std()}

    return objective


OBJECTIVES.add("toy_smooth", ObjectiveKind(build=smooth, options={"amount": 0.1}))


class PatchTokenizer(CodebookTokenizer):
    """A linear layer on either side of a codebook."""

    def __init__(self, settings, *, seed=0):
        super().__init__(settings)
        stride = settings.stride_px
        self.encoder = nn.Conv2d(3, settings.code_dim, stride, stride)
        self.codebook = Codebook.from_settings(settings, seed=seed)
        self.decoder = nn.ConvTranspose2d(settings.code_dim, 3, stride, stride)

    def trunk(self, images_11):
        return self.encoder(images_11.to(self.encoder.weight.dtype))

    def to_features(self, outputs):
        return outputs

    def forward(self, images_11):
        quantized = self.codebook(self.encode(images_11))
        return TokenizerOutput(self._decode(quantized.quantized), quantized.codes, quantized.commitment)

    def decode_codes(self, codes, grid):
        return self._decode(self.codebook.lookup(codes, grid))

    def _decode(self, vectors):
        return self.decoder(vectors.to(self.decoder.weight.dtype)).float()


TOKENIZERS.add(
    "toy_patches",
    TokenizerKind(
        network=PatchTokenizer, options={"patch_px": 8}, stride_px=lambda settings: settings.option("patch_px")
    ),
)


class PyramidNet(FeatureNet):
    """Two convolutions with stride 2, judged at the end of each: stages of unlike width and grid."""

    def after_blocks(self, images_norm, blocks):
        found = []
        for layer in self.net[: max(blocks)]:
            images_norm = layer(images_norm).relu()
            found.append(images_norm.flatten(2).transpose(1, 2))
        return [found[number - 1] for number in blocks]


def load_pyramid(weights, architecture, *, image_px, section):
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 12, 3, 2, 1))
    net.load_state_dict(torch.load(weights, weights_only=True))
    size = image_px or 32
    statistics = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return PyramidNet(
        net, image_px=size, grid=size // 4, depth=2, description="toy pyramid", licence="of no account", **statistics
    )


FEATURE_NETS.add(
    "toy_pyramid",
    FeatureNetFamily(
        recognises=lambda weights, architecture: architecture.startswith("toy_pyramid"), load=load_pyramid
    ),
)
