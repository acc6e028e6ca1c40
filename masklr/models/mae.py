"""Masked autoencoder around any timm vision transformer.

Shape suffixes: B batch, C channels, H W pixels, N patches, V visible patches, M masked patches (V + M = N), P prefix
tokens (class and registers), D encoder width, E decoder width, X pixels of a patch (C x patch height x patch width).
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from masklr.checkpoint_files import sound_checkpoint
from masklr.masks import Strategy, num_masked, patch_split
from masklr.models.cross_decoder import CrossBlock
from masklr.models.encoders import checked_instance, init_as_in_paper, named_encoder
from masklr.models.fast_linear import linear
from masklr.models.float32_products import apply_layer
from masklr.models.patches import num_predicted, patch_deviation, patchify, predicted_subset, rows, unpatchify
from masklr.models.pretrained import load_weights
from masklr.models.timm_models import check_size

Split = tuple[Tensor, Tensor]  # indices of visible patches (B, V), of masked patches (B, M)


class MAEOutput(NamedTuple):
    """What one pass of a masked autoencoder gives.

    Attributes:
        loss: Mean squared error over predicted patches, a scalar.
        prediction: Pixels (B, M, X) of the patches that `masked` names.
        visible: Indices (B, V) of the patches that were encoded.
        masked: Indices (B, M) of the masked patches that were predicted.
        latent: Encoder tokens (B, P + V, D).
    """

    loss: Tensor
    prediction: Tensor
    visible: Tensor
    masked: Tensor
    latent: Tensor


class MaskedAutoencoder(nn.Module):
    """Encode the visible patches, predict the masked ones.

    Only visible patches are embedded and encoded. The decoder sees the encoded patches and one learned token for each
    patch to predict; the loss is the mean squared error over these patches, computed in float32.

    Args:
        encoder: Name of a timm vision transformer, or an instance. A named one is initialized as in the paper, with
            fixed sine-cosine positions; an instance, or one created with `pretrained: true`, keeps its weights and
            positions.
        image_size: Height and width in pixels, one number if equal. None: the encoder's own.
        patch_size: Height and width of a patch in pixels, one number if equal. None: the encoder's own.
        in_chans: Number of image channels. None: the encoder's own.
        mask_ratio: Share of patches removed, in (0, 1); exactly round(N * mask_ratio) of N. Two numbers, low and high:
            drawn between them for each batch; what has to be fixed, as in validation, takes their middle.
        decoder_dim: Width of the decoder; a multiple of 4 (sine-cosine positions) and of `decoder_heads`.
        decoder_depth: Number of transformer blocks of the decoder.
        decoder_heads: Number of attention heads of the decoder.
        strategy: How masked patches are drawn: `random`, `block` (rectangles as in BEiT) or `grid` (regular).
        norm_pixels: Whether the target is each patch normalized by its own mean and standard deviation.
        encoder_args: Overrides for `timm.create_model`, such as `embed_dim`, `depth`, `num_heads`, `class_token`.
        decoder: `full`: attention over all tokens, as in the paper. `cross`: masked tokens attend to encoder tokens
            alone, as in CrossMAE, so that any subset of them can be predicted.
        prediction_ratio: Share of the masked patches that are predicted in training, in (0, 1]; exactly
            round(M * prediction_ratio) of M, drawn for each image.
        checkpoint: Whether the backward pass computes the activations of each block anew instead of keeping them: the
            same gradients from less memory, in more time.
        weights: File of weights to start from: a checkpoint of such a model, what `masklr export` writes, timm's
            weights, or the original release's, with or without its decoder. Position embeddings are interpolated where
            the number of patches differs. None: random ones.

    Raises:
        ValueError: An unknown encoder; sizes that do not fit; a mask or prediction ratio that leaves no visible, no
            masked or no predicted patch; weights of another architecture.

    Reference:
        He et al., "Masked autoencoders are scalable vision learners", CVPR 2022; Fu et al., "Rethinking patch
        dependence for masked autoencoders", 2024 (`cross`, `prediction_ratio`); Chen et al., "Training deep nets with
        sublinear memory cost", 2016 (`checkpoint`).
    """

    encoder: Any  # a timm VisionTransformer; timm is imported when one is built
    decoder_positions: Tensor

    def __init__(
        self,
        encoder: str | nn.Module = "vit_tiny_patch16_224",
        image_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        in_chans: int | None = None,
        mask_ratio: float | tuple[float, float] = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        strategy: Strategy = "random",
        norm_pixels: bool = True,
        encoder_args: dict[str, Any] | None = None,
        decoder: Literal["full", "cross"] = "full",
        prediction_ratio: float = 1.0,
        checkpoint: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        from timm.layers import build_sincos2d_pos_embed

        from masklr.models.attention import accelerate

        if decoder not in ("full", "cross"):
            raise ValueError(f"Expected `decoder` full or cross, got {decoder!r}.")
        if decoder_heads < 1:
            raise ValueError(f"Expected `decoder_heads` of at least 1, got {decoder_heads}.")
        if decoder_dim % decoder_heads:
            raise ValueError(f"Expected `decoder_heads` to divide `decoder_dim`={decoder_dim}, got {decoder_heads}.")
        if decoder_dim % 4:
            raise ValueError(f"Expected `decoder_dim` to be a multiple of 4, got {decoder_dim}.")
        if decoder_depth < 1:
            raise ValueError(f"Expected `decoder_depth` of at least 1, got {decoder_depth}.")
        if isinstance(encoder, str):
            self.encoder = named_encoder(encoder, image_size, patch_size, in_chans, encoder_args or {})
        else:
            self.encoder = checked_instance(encoder, image_size, patch_size, in_chans, encoder_args)
        embed = self.encoder.patch_embed
        self.image_size: tuple[int, int] = tuple(embed.img_size)
        self.patch_size: tuple[int, int] = tuple(embed.patch_size)
        self.grid: tuple[int, int] = tuple(embed.grid_size)
        self.in_chans: int = embed.proj.in_channels
        self.mask_ratio, self.strategy, self.norm_pixels = mask_ratio, strategy, norm_pixels
        self.decoder, self.prediction_ratio, self.checkpoint = decoder, prediction_ratio, checkpoint
        self._check_ratios()

        if decoder == "full":
            self.decoder_embed = nn.Linear(self.encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        positions = build_sincos2d_pos_embed(list(self.grid), decoder_dim).float()
        self.register_buffer("decoder_positions", positions.unsqueeze(0), persistent=False)
        self.decoder_blocks = self._decoder_blocks(decoder_dim, decoder_depth, decoder_heads)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_head = nn.Linear(decoder_dim, self.in_chans * self.patch_size[0] * self.patch_size[1])
        nn.init.normal_(self.mask_token, std=0.02)
        for name, part in self.named_children():
            if name != "encoder":
                part.apply(init_as_in_paper)
        accelerate(self)
        if checkpoint:
            self.encoder.set_grad_checkpointing()
        if weights is not None:
            load_weights(self, sound_checkpoint(Path(weights)))

    def _check_ratios(self) -> None:
        """Raise where no split of the patches can be drawn."""
        interval = isinstance(self.mask_ratio, tuple)
        low, high = self.mask_ratio if isinstance(self.mask_ratio, tuple) else (self.mask_ratio, self.mask_ratio)
        if low > high:
            raise ValueError(f"Expected `mask_ratio` with low <= high, got {low} and {high}.")
        if interval and self.strategy == "grid":
            raise ValueError(
                f"Expected one `mask_ratio` for strategy grid, which has few possible ones, got {low} to {high}."
            )
        for ratio in (high, low):
            patch_split(1, self.grid, ratio, strategy=self.strategy, generator=torch.Generator())
        # The lowest mask ratio leaves the fewest patches to choose from.
        num_predicted(num_masked(self.grid[0] * self.grid[1], low), self.prediction_ratio)

    def _decoder_blocks(self, dim: int, depth: int, heads: int) -> nn.ModuleList:
        from timm.models.vision_transformer import Block

        from masklr.models.decoder_blocks import FirstTokensBlock, LastTokensBlock

        if self.decoder == "cross":
            return nn.ModuleList(CrossBlock(dim, self.encoder.embed_dim, heads) for _ in range(depth))
        # Before the first block, mask tokens differ by position alone; of the last, only the masked tokens are read.
        kinds = [*[FirstTokensBlock, *[Block] * (depth - 2)][: depth - 1], LastTokensBlock]
        return nn.ModuleList(kind(dim, heads, qkv_bias=True) for kind in kinds)

    @property
    def middle_mask_ratio(self) -> float:
        """The mask ratio, or the middle of its interval."""
        return sum(self.mask_ratio) / 2 if isinstance(self.mask_ratio, tuple) else self.mask_ratio

    def check_size(self, images: Tensor) -> None:
        """Raise unless images (B, C, H, W) have the channels and the size that the model was built for."""
        check_size(images, self.in_chans, self.image_size)

    def patchify(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N X"]:
        """Patches in rows, each in the order (channel, y, x), the order of the patch embedding's weights."""
        self.check_size(images)
        return patchify(images, self.patch_size)

    def unpatchify(self, patches: Float[Tensor, "B N X"]) -> Float[Tensor, "B C H W"]:
        """Images of patches in rows; the inverse of `patchify`."""
        return unpatchify(patches, self.grid, self.patch_size)

    def encode(
        self, images: Float[Tensor, "B C H W"], visible: Int[Tensor, "B V"] | None = None
    ) -> Float[Tensor, "B P_and_V D"]:
        """Encoder tokens after its final norm, prefix tokens first.

        Args:
            images: Normalized images.
            visible: Indices of the patches to encode; None encodes all, through timm's own `forward_features`.
        """
        if visible is None:
            self.check_size(images)
            return self.encoder.forward_features(images)
        return self._encode_patches(rows(self.patchify(images), visible), visible)

    def _encode_patches(self, patches_BVX: Tensor, visible_BV: Tensor) -> Tensor:
        vit = self.encoder
        embed = vit.patch_embed
        # The embedding is a convolution with stride = kernel: a matrix product on raw patches, of the visible ones
        # only.
        weight = embed.proj.weight.flatten(1)
        tokens_BVD = embed.norm(apply_layer(None, nn.functional.linear, patches_BVX, weight, bias=embed.proj.bias))
        prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        prefix_1PD = torch.cat(prefix, dim=1) if prefix else None
        if vit.pos_embed is not None:
            num_prefix_positions = 0 if vit.no_embed_class else vit.num_prefix_tokens
            positions_ND = vit.pos_embed[0, num_prefix_positions:]
            tokens_BVD = tokens_BVD + nn.functional.embedding(visible_BV, positions_ND)
            if prefix_1PD is not None and num_prefix_positions:
                prefix_1PD = prefix_1PD + vit.pos_embed[:, :num_prefix_positions]
        if prefix_1PD is not None:
            prefix_BPD = prefix_1PD.expand(len(tokens_BVD), -1, -1)
            tokens_BVD = torch.cat([prefix_BPD.to(tokens_BVD.dtype), tokens_BVD], dim=1)
        tokens_BVD = vit.norm_pre(vit.pos_drop(tokens_BVD))
        for block in vit.blocks:
            tokens_BVD = self._through(block, tokens_BVD)
        return vit.norm(tokens_BVD)

    def _through(self, block: nn.Module, *inputs: Any) -> Tensor:
        """What a block gives; under `checkpoint` its activations are computed again in the backward pass."""
        if self.checkpoint and torch.is_grad_enabled():
            return recomputed(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def decode(
        self,
        latent: Float[Tensor, "B P_and_V D"],
        visible: Int[Tensor, "B V"],
        masked: Int[Tensor, "B M"],
    ) -> Float[Tensor, "B M X"]:
        """Pixels of the masked patches (normalized by patch if `norm_pixels`), from the encoded visible ones.

        Args:
            latent: Encoder tokens, prefix tokens first.
            visible: Indices of the patches that they encode.
            masked: Indices of the patches to predict; all of the masked ones, or some.
        """
        positions_NE = self.decoder_positions[0]
        masked_BME = self.mask_token + nn.functional.embedding(masked, positions_NE)
        if self.decoder == "cross":
            for block in self.decoder_blocks:
                masked_BME = self._through(block, masked_BME, latent)
            return linear(self.decoder_head, self.decoder_norm(masked_BME))
        num_prefix = latent.shape[1] - visible.shape[1]
        tokens = linear(self.decoder_embed, latent)
        # Sums with float32 positions are float32 under autocast too, so the residual stream loses nothing to bf16.
        visible_BVE = tokens[:, num_prefix:] + nn.functional.embedding(visible, positions_NE)
        # Attention does not depend on the order of tokens, so nothing is shuffled back into the image's order.
        known = torch.cat([tokens[:, :num_prefix].to(visible_BVE.dtype), visible_BVE], dim=1)
        *blocks, last_block = self.decoder_blocks
        if blocks:
            tokens = self._through(blocks[0], known, masked_BME, (self.mask_token + positions_NE)[0], masked)
            for block in blocks[1:]:
                tokens = self._through(block, tokens)
        else:
            tokens = torch.cat([known, masked_BME], dim=1)
        return linear(self.decoder_head, self.decoder_norm(self._through(last_block, tokens, masked.shape[1])))

    def target(self, images: Float[Tensor, "B C H W"], masked: Int[Tensor, "B M"]) -> Float[Tensor, "B M X"]:
        """What `decode` should predict: masked patches, normalized by their own mean and deviation if `norm_pixels`."""
        patches = rows(self.patchify(images), masked).float()
        if self.norm_pixels:
            centered = patches - patches.mean(-1, keepdim=True)
            return centered / patch_deviation(centered)
        return patches

    def draw_split(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Split:
        """Visible patches and masked patches to predict, as the model is to be trained with.

        Where `mask_ratio` is an interval, the ratio of the batch is drawn on the CPU, so that nothing waits for the
        device (unless a generator of another device is given).

        Args:
            batch: Number of images.
            generator: Source of the draws; the default generators of the CPU and of the device when None.
            device: Where the split is made; the generator's device when None.

        Returns:
            Indices (B, V) of visible patches and (B, M) of masked ones to predict, each row ascending.

        Reference:
            Dong, Wang and Kluger, "R2MAE", 2025 (random mask ratios).
        """
        ratio = self.mask_ratio
        if isinstance(ratio, tuple):
            low, high = ratio
            on = "cpu" if generator is None else generator.device
            ratio = low + (high - low) * torch.rand((), generator=generator, device=on).item()
        visible, masked = patch_split(
            batch, self.grid, ratio, strategy=self.strategy, generator=generator, device=device
        )
        return visible, predicted_subset(masked, self.prediction_ratio, generator=generator)

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        split: Split | None = None,
        generator: torch.Generator | None = None,
    ) -> MAEOutput:
        """Mask, encode, decode and compare.

        Args:
            images: Normalized images.
            split: Visible patches, and masked ones to predict; None draws them, as `draw_split`.
            generator: Where they are drawn from; None is the default generator of the images' device.
        """
        visible, masked = split or self.draw_split(len(images), generator, images.device)
        latent = self.encode(images, visible)
        prediction = self.decode(latent, visible, masked)
        loss = (prediction.float() - self.target(images, masked)).square().mean()
        return MAEOutput(loss, prediction, visible, masked, latent)

    def reconstruct(self, images: Float[Tensor, "B C H W"], split: Split) -> tuple[Tensor, Tensor]:
        """The images with masked patches set to zero, and with masked patches as predicted.

        Patch-normalized predictions are put back on the scale of their patch, which only the original knows: the
        picture shows the structure that was predicted, in true contrast.
        """
        visible, masked = split
        prediction = self.decode(self.encode(images, visible), visible, masked).float()
        patches = self.patchify(images).float()
        if self.norm_pixels:
            originals = rows(patches, masked)
            means = originals.mean(-1, keepdim=True)
            prediction = prediction * patch_deviation(originals - means) + means
        index = masked.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
        hidden = patches.scatter(1, index, 0.0)
        return self.unpatchify(hidden), self.unpatchify(patches.scatter(1, index, prediction))
