"""The backbone: a ViT with the parameters of timm's `Beit`, blocks of our own and one relative position bias for all.

Parameters have timm's names and meaning, so a release for timm is a change of names. The blocks compute differently:
attention with a shared bias (`attention.py`), stochastic depth drawn outside so that one compiled graph serves all
blocks, and activation checkpointing inside. Initialisation is BEiT's. Sizes (width x depth x heads): B 768 x 12 x 12,
L 1024 x 24 x 16, H 1280 x 32 x 16 with patch 14.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from timm.models.beit import Beit, Block, RelativePositionBias
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from peco_ds.config import AttentionForm, ModelSettings
from peco_ds.models.attention import attend, bias_of_positions
from peco_ds.models.block_linear import block_linear, fits_fp8
from peco_ds.schedules import images_taken

ActivationCheckpointing = Literal["none", "selective", "full"]


class TransformerBlock(Block):
    """timm's BEiT block by its parameters: x + gamma_1 attention(norm(x)), then x + gamma_2 mlp(norm(x)).

    The unit that ZeRO-3 gathers and torch.compile sees.

    Args:
        layer_scale: initial gammas; 0: none.
        grid: patches a side, for a bias table of the block's own; None: the bias is passed to `forward`.
        drop_path, drop_path_by: stochastic depth, see `draw_paths`.
        activation_checkpointing: in the backward pass, "selective": all but the matrix products and attention, "full":
            all.
        attention: see `attention.attend`.
        fold_layer_scale: take the gammas' gradients from those of the weights (`block_linear.block_linear`).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.0,
        grid: int | None = None,
        drop_path: float = 0.0,
        drop_path_by: Literal["image", "subset"] = "image",
        activation_checkpointing: ActivationCheckpointing = "none",
        attention: AttentionForm = "auto",
        fold_layer_scale: bool = True,
    ) -> None:
        super().__init__(
            width,
            heads,
            qkv_bias=True,
            mlp_ratio=mlp_ratio,
            init_values=layer_scale or None,
            window_size=(grid, grid) if grid else None,
        )
        self.drop_path, self.drop_path_by, self.activation_checkpointing = (
            drop_path,
            drop_path_by,
            activation_checkpointing,
        )
        self.attention_form: AttentionForm = attention
        self.fold_layer_scale = fold_layer_scale
        # Products in 8 bits while it trains (`runtime/fp8_choice.py`).
        self.fp8 = False

    def draw_paths(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The random choice of stochastic depth for attention and MLP in this pass; None where nothing is dropped.

        "image": factors [B, 1, 1], 0 with probability drop_path, else 1 / (1 - drop_path). "subset": int64 [n], the
        images that take the branch; n is B (1 - drop_path), rounded, at least 1, so the share is exact in every pass
        and branch, and the others cost nothing; what comes out is multiplied by B / n.

        Source: stochastic depth (arXiv 1603.09382); subsets: DINOv2 (arXiv 2304.07193), section 5.
        """
        if not self.training or not self.drop_path:
            return None, None
        if self.drop_path_by == "image":
            taken = torch.rand(2, len(x), 1, 1, device=x.device) >= self.drop_path
            return (taken.to(x.dtype) / (1 - self.drop_path)).unbind(0)
        images = images_taken(len(x), self.drop_path)
        if images == len(x):
            return None, None
        return torch.rand(2, len(x), device=x.device).argsort(dim=1)[:, :images].unbind(0)

    def forward(
        self,
        x: torch.Tensor,
        shared_rel_pos_bias: torch.Tensor | None = None,
        attention_path: torch.Tensor | None = None,
        mlp_path: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens [B, T, D] -> the same.

        Args:
            shared_rel_pos_bias: [H, T, T], or one an image [B, H, T, T]; not needed where the block has a table of its
                own.
            attention_path, mlp_path: what `draw_paths` gave.
        """
        if self.activation_checkpointing == "none" or not self.training:
            return self._run(x, shared_rel_pos_bias, attention_path, mlp_path)
        # Non-reentrant: the recomputed forward runs the same kernels as the first, so no loss changes. Random numbers
        # were drawn before.
        contexts = {"context_fn": _keep_products} if self.activation_checkpointing == "selective" else {}
        return checkpoint(
            self._run,
            x,
            shared_rel_pos_bias,
            attention_path,
            mlp_path,
            use_reentrant=False,
            preserve_rng_state=False,
            **contexts,
        )

    def _run(self, x, bias, attention_path, mlp_path):
        x = _add(x, self._attention, attention_path, self._bias(bias))
        return _add(x, self._mlp, mlp_path, None)

    def _bias(self, given: torch.Tensor | None) -> torch.Tensor | None:
        """The bias of this block's attention, of what `forward` was given."""
        table = self.attn.relative_position_bias_table
        return given if table is None else bias_of_positions(table, self.attn.relative_position_index)

    def _attention(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        attn = self.attn
        qkv = self._linear(
            self.norm1(x), attn.qkv.weight, torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        )
        attended = attend(qkv.unflatten(2, (3, attn.num_heads, -1)), bias, self.attention_form)
        return self._scaled(attended, attn.proj, self.gamma_1)

    def _mlp(self, x: torch.Tensor, _bias) -> torch.Tensor:
        mlp = self.mlp
        hidden = mlp.act(self._linear(self.norm2(x), mlp.fc1.weight, mlp.fc1.bias))
        return self._scaled(hidden, mlp.fc2, self.gamma_2)

    def _scaled(self, x: torch.Tensor, layer: nn.Linear, gamma: torch.Tensor | None) -> torch.Tensor:
        """The layer that ends a branch, times its layer scale where there is one."""
        if gamma is not None and self.fold_layer_scale and not _autocasts(x):
            return block_linear(x, layer.weight, layer.bias, gamma, fp8=self._takes_fp8(layer.weight))
        out = self._linear(x, layer.weight, layer.bias)
        return out if gamma is None else gamma * out

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if self._takes_fp8(weight) and not _autocasts(x):
            return block_linear(x, weight, bias, fp8=True)
        return self._plain_linear(x, weight, bias)

    def _takes_fp8(self, weight: torch.Tensor) -> bool:
        return self.fp8 and self.training and fits_fp8(weight)

    @property
    def _plain_linear(self):
        # ZeRO-3 replaces F.linear by a function that saves the weight and not a view, which would keep it gathered. But
        # that function adds the bias in place, to the very product that selective checkpointing keeps, and would add it
        # a second time. There nothing is saved for the weight, so the plain operator will do.
        return torch.ops.aten.linear if self.activation_checkpointing == "selective" else F.linear


def _add(x: torch.Tensor, branch, path: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """x + branch(x), under a path of `draw_paths`."""
    if path is None:
        return x + branch(x, bias)
    if path.is_floating_point():
        return x + path * branch(x, bias)
    if bias is not None and bias.dim() == 4:
        bias = bias[path]
    out = branch(x[path], bias)
    # No two rows go to one place, so the order in which a device adds them does not matter.
    return x.index_add(0, path, (out * (len(x) / len(path))).to(x.dtype))


def _autocasts(x: torch.Tensor) -> bool:
    """Whether autocast rules over products of x; a tensor without a device knows none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_mm.default,
    torch.ops.peco_ds.biased_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def _policy(_context, operator, *_args, **_options) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


_keep_products = partial(create_selective_checkpoint_contexts, _policy)


def build_blocks(
    settings: ModelSettings, *, own_bias: bool = False, activation_checkpointing: ActivationCheckpointing = "none"
) -> nn.ModuleList:
    """The backbone's blocks; stochastic depth grows linearly from 0 in the first to its rate in the last."""
    return nn.ModuleList(
        TransformerBlock(
            settings.width,
            settings.heads,
            mlp_ratio=settings.mlp_ratio,
            layer_scale=settings.layer_scale,
            grid=settings.grid if own_bias else None,
            drop_path=rate,
            drop_path_by=settings.drop_path_by,
            activation_checkpointing=activation_checkpointing,
            attention=settings.attention,
            fold_layer_scale=settings.fold_layer_scale,
        )
        for rate in calculate_drop_path_rates(settings.drop_path, settings.depth)
    )


class PositionBias(RelativePositionBias):
    """timm's table by its parameter.

    [H, T, T] in float32 whatever the table's dtype, since all blocks add to its gradient.
    """

    def forward(self) -> torch.Tensor:
        return bias_of_positions(self.relative_position_bias_table, self.relative_position_index)


def build_backbone(settings: ModelSettings, *, activation_checkpointing: ActivationCheckpointing = "none") -> Beit:
    """A `Beit` without head that ends in its final norm, to be run by `run_blocks`.

    Source: BEiT (arXiv 2106.08254) and its released `modeling_pretrain.py`: shared bias table, no absolute position
        embedding, q and v bias but no key bias, layer scale, LayerNorm eps 1e-6.
    """
    backbone = Beit(**timm_arguments(settings) | {"depth": 0})
    backbone.blocks, backbone.rel_pos_bias = (
        build_blocks(settings, activation_checkpointing=activation_checkpointing),
        PositionBias((settings.grid, settings.grid), settings.heads),
    )
    init_as_beit(backbone, settings.init_std)
    return backbone


def timm_arguments(
    settings: ModelSettings, *, shared_bias: bool = True, num_classes: int = 0, pooling: str = "class"
) -> dict:
    """Keyword arguments that make timm's `Beit` this backbone.

    Args:
        shared_bias: one table for all blocks (pre-training) or one a block (fine-tuning, releases).
        pooling: "class" keeps the final norm on every token; "mean" moves it behind the pooling, as `fc_norm`.
    """
    return dict(
        img_size=settings.image_px,
        patch_size=settings.patch_px,
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.heads,
        mlp_ratio=settings.mlp_ratio,
        init_values=settings.layer_scale,
        drop_path_rate=settings.drop_path,
        use_abs_pos_emb=settings.absolute_positions,
        use_shared_rel_pos_bias=shared_bias,
        use_rel_pos_bias=not shared_bias,
        num_classes=num_classes,
        global_pool="avg" if pooling == "mean" else "token",
    )


def mlp_ratio_of(width: int, hidden: int) -> float:
    """The ratio from which timm computes int(width * ratio) = hidden.

    The quotient may fall short of it by rounding (3136 / 704), and one unit would be missing.
    """
    ratio = hidden / width
    while int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


@torch.no_grad()
def init_as_beit(backbone: Beit, std: float) -> None:
    """Truncated normal cut at one standard deviation, then attention output and second MLP weights of block i (from 1)
    over sqrt(2 i).

    Must run on whole parameters, so before ZeRO-3 partitions them: under `zero.Init` the in-place division is lost
    without a word.
    Source: released BEiT `modeling_pretrain.py` (`trunc_normal_` with a = -std, b = std; `fix_init_weight`).
    """
    init_projections(backbone, std)
    trunc_normal(backbone.cls_token, std)
    if backbone.pos_embed is not None:
        trunc_normal(backbone.pos_embed, std)
    scale_by_depth(backbone.blocks)


@torch.no_grad()
def init_as_beit_fine_tunes(classifier: Beit, std: float) -> None:
    """Class token, places and linear layers normal(0, std) cut at +-2, so their deviation is `std` itself; then
    attention output and second MLP weights of block i (from 1) over sqrt(2 i). The patch embedding keeps PyTorch's
    default.

    Must run on whole parameters, as `init_as_beit`.
    Source: released BEiT `modeling_finetune.py` (timm's `trunc_normal_`, whose bounds are values, not deviations;
        `fix_init_weight`; convolutions are not initialised there).
    """
    nn.init.trunc_normal_(classifier.cls_token, std=std)
    if classifier.pos_embed is not None:
        nn.init.trunc_normal_(classifier.pos_embed, std=std)
    for part in classifier.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    scale_by_depth(classifier.blocks)


@torch.no_grad()
def init_projections(module: nn.Module, std: float) -> None:
    """Weights of every linear layer and convolution inside: truncated normal; biases: zero."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            trunc_normal(part.weight, std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


@torch.no_grad()
def scale_by_depth(blocks: Iterable[Block], first: int = 1) -> None:
    """Attention output and second MLP weights of block i over sqrt(2 i); `first` is the i of the first one."""
    for number, block in enumerate(blocks, start=first):
        block.attn.proj.weight.div_(math.sqrt(2.0 * number))
        block.mlp.fc2.weight.div_(math.sqrt(2.0 * number))


@torch.no_grad()
def trunc_normal(tensor: torch.Tensor, std: float) -> None:
    """Normal(0, std) cut at +-std: its own standard deviation is 0.54 of `std`.

    Computed with the inverse distribution function. PyTorch's own function draws again until every value lies inside, a
    third of them each time: a minute for ViT-H.
    """
    edge = math.erf(math.sqrt(0.5))
    tensor.uniform_(-edge, edge).erfinv_().mul_(math.sqrt(2) * std).clamp_(-std, std)


def run_blocks(blocks: Iterable[TransformerBlock], x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Tokens [B, T, D] through blocks; `bias` as in `TransformerBlock.forward`."""
    for block in blocks:
        x = block(x, bias, *block.draw_paths(x))
    return x


def with_class_token(backbone: Beit, patches: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
    """[B, N, D] -> [B, 1 + N, D], with the places' vectors added where the backbone has them.

    Args:
        places: [1, 1 + N, D], where they are not the backbone's `pos_embed` as it stands.
    """
    tokens = torch.cat([backbone.cls_token.expand(len(patches), -1, -1).to(patches.dtype), patches], dim=1)
    places = backbone.pos_embed if places is None else places
    return tokens if places is None else tokens + places.to(tokens.dtype)


def patches_of(backbone: Beit, images_norm: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, S, S], cast to the parameters' dtype here -> [B, N, D]."""
    return backbone.patch_embed(images_norm.to(backbone.cls_token.dtype))
