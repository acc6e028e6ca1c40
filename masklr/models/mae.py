"""Masked autoencoder around any timm vision transformer.

Shape suffixes: B batch, C channels, H W pixels, N patches, V visible patches, M masked patches (V + M = N), P prefix
tokens (class and registers), D encoder width, E decoder width, X pixels of a patch (C x patch height x patch width).
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from masklr.masks import Strategy, num_masked, patch_split
from masklr.models.timm_models import check_size, pair, timm_model

Split = tuple[Tensor, Tensor]  # indices of visible patches (B, V), of masked patches (B, M)


class MAEOutput(NamedTuple):
    """What one pass of a masked autoencoder gives: `prediction` is (B, M, X), of the patches that `masked` names."""

    loss: Tensor
    prediction: Tensor
    visible: Tensor
    masked: Tensor


class MaskedAutoencoder(nn.Module):
    """Encode the visible patches, predict the masked ones.

    Only visible patches are embedded and encoded. The decoder sees the encoded patches and one learned token for each
    masked patch; the loss is the mean squared error over masked patches, computed in float32.

    Args:
        encoder: Name of a timm vision transformer, or an instance. A named one is initialized as in the paper, with
            fixed sine-cosine positions; an instance, or one created with `pretrained: true`, keeps its weights and
            positions.
        image_size: Height and width in pixels, one number if equal. None: the encoder's own.
        patch_size: Height and width of a patch in pixels, one number if equal. None: the encoder's own.
        in_chans: Number of image channels. None: the encoder's own.
        mask_ratio: Share of patches removed, in (0, 1); exactly round(N * mask_ratio) of N.
        decoder_dim: Width of the decoder; a multiple of 4 (sine-cosine positions) and of `decoder_heads`.
        decoder_depth: Number of transformer blocks of the decoder.
        decoder_heads: Number of attention heads of the decoder.
        strategy: How masked patches are drawn: `random`, `block` (rectangles as in BEiT) or `grid` (regular).
        norm_pixels: Whether the target is each patch normalized by its own mean and standard deviation.
        encoder_args: Overrides for `timm.create_model`, such as `embed_dim`, `depth`, `num_heads`, `class_token`.

    Raises:
        ValueError: An unknown encoder; sizes that do not fit; a mask ratio that leaves no visible or no masked patch.

    Reference:
        He et al., "Masked autoencoders are scalable vision learners", CVPR 2022.
    """

    encoder: Any  # a timm VisionTransformer; timm is imported when one is built
    decoder_positions: Tensor

    def __init__(
        self,
        encoder: str | nn.Module = "vit_tiny_patch16_224",
        image_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        in_chans: int | None = None,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        strategy: Strategy = "random",
        norm_pixels: bool = True,
        encoder_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        from timm.layers import build_sincos2d_pos_embed
        from timm.models.vision_transformer import Block

        from masklr.models.attention import LastTokensBlock, accelerate

        if decoder_dim % decoder_heads:
            raise ValueError(f"Expected `decoder_heads` to divide `decoder_dim`={decoder_dim}, got {decoder_heads}.")
        if decoder_dim % 4:
            raise ValueError(f"Expected `decoder_dim` to be a multiple of 4, got {decoder_dim}.")
        if decoder_depth < 1:
            raise ValueError(f"Expected `decoder_depth` of at least 1, got {decoder_depth}.")
        if isinstance(encoder, str):
            self.encoder = named_encoder(encoder, image_size, patch_size, in_chans, encoder_args or {})
        else:
            self.encoder = _checked_instance(encoder, image_size, patch_size, in_chans, encoder_args)
        embed = self.encoder.patch_embed
        self.image_size: tuple[int, int] = tuple(embed.img_size)
        self.patch_size: tuple[int, int] = tuple(embed.patch_size)
        self.grid: tuple[int, int] = tuple(embed.grid_size)
        self.in_chans: int = embed.proj.in_channels
        self.mask_ratio, self.strategy, self.norm_pixels = mask_ratio, strategy, norm_pixels
        num_patches = self.grid[0] * self.grid[1]
        num_masked(num_patches, mask_ratio)  # raises where nothing would be left
        patch_split(1, self.grid, mask_ratio, strategy=strategy, generator=torch.Generator())

        self.decoder_embed = nn.Linear(self.encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        positions = build_sincos2d_pos_embed(list(self.grid), decoder_dim).float()
        self.register_buffer("decoder_positions", positions.unsqueeze(0), persistent=False)
        # Of the last block only the masked tokens are read.
        kinds = [Block] * (decoder_depth - 1) + [LastTokensBlock]
        self.decoder_blocks = nn.ModuleList(kind(decoder_dim, decoder_heads, qkv_bias=True) for kind in kinds)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_head = nn.Linear(decoder_dim, self.in_chans * self.patch_size[0] * self.patch_size[1])
        nn.init.normal_(self.mask_token, std=0.02)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_head):
            part.apply(init_as_in_paper)
        accelerate(self)

    def check_size(self, images: Tensor) -> None:
        """Raise unless images (B, C, H, W) have the channels and the size that the model was built for."""
        check_size(images, self.in_chans, self.image_size)

    def patchify(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N X"]:
        """Patches in rows, each in the order (channel, y, x), the order of the patch embedding's weights."""
        self.check_size(images)
        B, C = images.shape[:2]
        (h, w), (y, x) = self.grid, self.patch_size
        return images.view(B, C, h, y, w, x).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, C * y * x)

    def unpatchify(self, patches: Float[Tensor, "B N X"]) -> Float[Tensor, "B C H W"]:
        """Images of patches in rows; the inverse of `patchify`."""
        (h, w), (y, x) = self.grid, self.patch_size
        images = patches.view(len(patches), h, w, self.in_chans, y, x).permute(0, 3, 1, 4, 2, 5)
        return images.reshape(len(patches), self.in_chans, h * y, w * x)

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
        tokens_BVD = embed.norm(nn.functional.linear(patches_BVX, embed.proj.weight.flatten(1), embed.proj.bias))
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
        return vit.norm(vit.blocks(vit.norm_pre(vit.pos_drop(tokens_BVD))))

    def decode(
        self,
        latent: Float[Tensor, "B P_and_V D"],
        visible: Int[Tensor, "B V"],
        masked: Int[Tensor, "B M"],
    ) -> Float[Tensor, "B M X"]:
        """Pixels of the masked patches (normalized by patch if `norm_pixels`), from the encoded visible ones."""
        num_prefix = latent.shape[1] - visible.shape[1]
        tokens = self.decoder_embed(latent)
        positions_NE = self.decoder_positions[0]
        # Sums with float32 positions are float32 under autocast too, so the residual stream loses nothing to bf16.
        visible_BVE = tokens[:, num_prefix:] + nn.functional.embedding(visible, positions_NE)
        masked_BME = self.mask_token + nn.functional.embedding(masked, positions_NE)
        # Attention does not depend on the order of tokens, so nothing is shuffled back into the image's order.
        tokens = torch.cat([tokens[:, :num_prefix].to(visible_BVE.dtype), visible_BVE, masked_BME], dim=1)
        *blocks, last_block = self.decoder_blocks
        for block in blocks:
            tokens = block(tokens)
        return self.decoder_head(self.decoder_norm(last_block(tokens, masked.shape[1])))

    def target(self, images: Float[Tensor, "B C H W"], masked: Int[Tensor, "B M"]) -> Float[Tensor, "B M X"]:
        """What `decode` should predict: masked patches, normalized by their own mean and deviation if `norm_pixels`."""
        patches = rows(self.patchify(images), masked).float()
        if self.norm_pixels:
            patches = (patches - patches.mean(-1, keepdim=True)) / patch_deviation(patches)
        return patches

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        split: Split | None = None,
        generator: torch.Generator | None = None,
    ) -> MAEOutput:
        """Mask, encode, decode and compare.

        Args:
            images: Normalized images.
            split: Visible and masked patches; None draws them.
            generator: Where they are drawn from; None is the global generator of the images' device.
        """
        visible, masked = split or patch_split(
            len(images), self.grid, self.mask_ratio, strategy=self.strategy, generator=generator, device=images.device
        )
        prediction = self.decode(self.encode(images, visible), visible, masked)
        loss = (prediction.float() - self.target(images, masked)).square().mean()
        return MAEOutput(loss, prediction, visible, masked)

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
            prediction = prediction * patch_deviation(originals) + originals.mean(-1, keepdim=True)
        index = masked.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
        hidden = patches.scatter(1, index, 0.0)
        return self.unpatchify(hidden), self.unpatchify(patches.scatter(1, index, prediction))


def rows(tokens_BND: Tensor, index_BK: Tensor) -> Tensor:
    """The tokens that each row of the index names, (B, K, D)."""
    return tokens_BND.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, tokens_BND.shape[-1]))


def patch_deviation(patches: Float[Tensor, "B M X"]) -> Float[Tensor, "B M 1"]:
    """Standard deviation of each patch, with the constant of the paper's code so that flat patches stay finite."""
    return (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def init_as_in_paper(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers, as the masked autoencoder's authors initialize them."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def named_encoder(
    name: str,
    image_size: int | tuple[int, int] | None,
    patch_size: int | tuple[int, int] | None,
    in_chans: int | None,
    encoder_args: dict[str, Any],
) -> Any:
    """A timm vision transformer by name, without a head, for these sizes."""
    from timm.layers import build_sincos2d_pos_embed

    image, patch = pair(image_size), pair(patch_size)
    if image and patch:
        _check_divides(image, patch)
    sizes = {"img_size": image, "patch_size": patch, "in_chans": in_chans}
    # Without a class token timm must not pool by it; its final norm has to stay before pooling, where the decoder
    # reads.
    pooling = {"global_pool": "token" if encoder_args.get("class_token", True) else "avg", "fc_norm": False}
    given = {argument: value for argument, value in sizes.items() if value is not None}
    options: dict[str, Any] = {"num_classes": 0, **given, **pooling, **encoder_args}
    encoder = timm_model("encoder", name, options, family="vit_*")
    _check_vision_transformer(encoder)
    if not encoder_args.get("pretrained"):
        encoder.apply(init_as_in_paper)
        # The authors' xavier initialization at their size (768 inputs, width 768), for any size: patches of few pixels
        # would otherwise be drowned by their positions.
        nn.init.normal_(encoder.patch_embed.proj.weight, std=encoder.patch_embed.proj.weight[0].numel() ** -0.5)
        if encoder.pos_embed is not None:
            if encoder.embed_dim % 4:
                raise ValueError(f"Expected the encoder's width to be a multiple of 4, got {encoder.embed_dim}.")
            positions = build_sincos2d_pos_embed(list(encoder.patch_embed.grid_size), encoder.embed_dim)
            with torch.no_grad():
                encoder.pos_embed.zero_()  # prefix tokens have no place in the image
                encoder.pos_embed[:, -len(positions) :] = positions
            encoder.pos_embed.requires_grad_(False)
    return encoder


def _check_divides(image_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    for side, size, patch in zip(("height", "width"), image_size, patch_size, strict=True):
        if patch < 1 or size % patch:
            raise ValueError(f"Expected `image_size` {side} {size} to be a multiple of `patch_size` {patch}.")


def _check_vision_transformer(encoder: Any) -> None:
    from timm.models.vision_transformer import VisionTransformer

    kind = type(encoder).__name__
    if not isinstance(encoder, VisionTransformer):
        raise ValueError(f"Expected `encoder` to be a timm VisionTransformer, got a {kind}.")
    if type(encoder)._pos_embed is not VisionTransformer._pos_embed:
        # A distilled one has a second class token, which `encode` would leave out.
        raise ValueError(f"Expected `encoder` to place its tokens as timm's VisionTransformer; a {kind} does not.")
    projection = getattr(encoder.patch_embed, "proj", None)
    if not isinstance(projection, nn.Conv2d) or projection.kernel_size != projection.stride:
        raise ValueError(f"Expected `encoder` to embed patches by one convolution; that of this {kind} does not.")
    if not isinstance(encoder.patch_drop, nn.Identity):
        raise ValueError("Expected `encoder` without `patch_drop_rate`: the masked autoencoder drops patches itself.")
    _check_divides(tuple(encoder.patch_embed.img_size), tuple(encoder.patch_embed.patch_size))


def _checked_instance(
    encoder: Any,
    image_size: int | tuple[int, int] | None,
    patch_size: int | tuple[int, int] | None,
    in_chans: int | None,
    encoder_args: dict[str, Any] | None,
) -> Any:
    """An encoder that came as an instance, if the other arguments agree with it."""
    _check_vision_transformer(encoder)
    if encoder_args:
        raise ValueError("Expected no `encoder_args` beside an `encoder` that is an instance; it is already built.")
    embed = encoder.patch_embed
    own = {"image_size": tuple(embed.img_size), "patch_size": tuple(embed.patch_size)}
    for argument, value in (("image_size", pair(image_size)), ("patch_size", pair(patch_size))):
        if value is not None and value != own[argument]:
            raise ValueError(f"Expected `{argument}` {own[argument]}, that of the `encoder` given, got {value}.")
    if in_chans is not None and in_chans != embed.proj.in_channels:
        raise ValueError(f"Expected `in_chans` {embed.proj.in_channels}, that of the `encoder` given, got {in_chans}.")
    return encoder
