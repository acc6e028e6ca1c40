"""A backbone with a head."""

from pathlib import Path
from typing import Any

from jaxtyping import Float, Num
from torch import Tensor, nn

from masklr.checkpoint_files import sound_checkpoint
from masklr.models.fast_linear import linear
from masklr.models.pretrained import load_encoder
from masklr.models.run_encoder import is_file, pretrained_encoder
from masklr.models.timm_models import check_size, pair, size_options, timm_model


class Classifier(nn.Module):
    """Linear classifier on the pooled features of a backbone.

    A timm model by name is created without its own head; an instance (a timm model, the encoder of a
    `MaskedAutoencoder`) keeps its weights and loses its head, if it has one. Initialization and pooling are timm's.

    Args:
        backbone: Name of any timm model; or a pretraining run (its folder, or a checkpoint in it), whose encoder is
            taken; or an instance that states the size of its pooled features as `num_features` or `embed_dim`.
        num_classes: Number of classes, at least 1.
        image_size: Height and width in pixels, one number if equal; passed on where the architecture is built for a
            size. None: the backbone's own, and any where it takes any.
        patch_size: Height and width of a patch in pixels, one number if equal. None: the backbone's own.
        in_chans: Number of image channels. None: the backbone's own.
        pretrained: Whether a named backbone comes with timm's pretrained weights, downloaded at first use.
        backbone_args: Overrides for `timm.create_model`, such as `depth`, `drop_path_rate`, `global_pool`.
        weights: File of weights for a vision transformer by name: a checkpoint of masklr's, what `masklr export`
            writes, timm's weights or the original release's. Position embeddings are interpolated where the number of
            patches differs.
        frozen: Whether the backbone stays as it is, in evaluation mode, and the head alone learns.
        head_norm: Whether features are standardized by a batch norm without scale and shift before they reach the
            head, as in the linear probe of the masked autoencoder's paper.

    Raises:
        ValueError: An unknown backbone, sizes that it cannot be built for, arguments that contradict an instance,
            weights of another architecture.

    Reference:
        He et al., "Masked autoencoders are scalable vision learners", CVPR 2022, appendix A.1 (`head_norm`).
    """

    backbone: Any  # timm is imported when one is built

    def __init__(
        self,
        backbone: str | nn.Module = "vit_tiny_patch16_224",
        num_classes: int = 10,
        image_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        in_chans: int | None = None,
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        weights: str | None = None,
        frozen: bool = False,
        head_norm: bool = False,
    ) -> None:
        super().__init__()
        from masklr.models.attention import accelerate

        if num_classes < 1:
            raise ValueError(f"Expected `num_classes` of at least 1, got {num_classes}.")
        if isinstance(backbone, str):
            options = {**size_options(image_size, patch_size, in_chans), **(backbone_args or {})}
            self.backbone = _backbone_by_name(backbone, options, pretrained, weights)
        else:
            unwanted = {
                "patch_size": patch_size,
                "pretrained": pretrained,
                "backbone_args": backbone_args,
                "weights": weights,
            }
            for argument, value in unwanted.items():
                if value:
                    raise ValueError(f"Expected no `{argument}` beside a `backbone` that is an instance, got {value}.")
            self.backbone = backbone
            if hasattr(backbone, "reset_classifier"):
                self.backbone.reset_classifier(0)
        self.num_features = feature_size(self.backbone)
        self.num_classes = num_classes
        self.in_chans = _agreed("in_chans", in_chans, _channels(self.backbone))
        self.image_size = _agreed("image_size", pair(image_size), _fixed_size(self.backbone))
        self.head_norm: nn.Module = (
            nn.BatchNorm1d(self.num_features, 1e-6, affine=False) if head_norm else nn.Identity()
        )
        self.head = nn.Linear(self.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)  # as timm's heads
        nn.init.zeros_(self.head.bias)
        accelerate(self)
        self.frozen = frozen
        if frozen:
            self.backbone.requires_grad_(False)
            self.backbone.eval()

    def train(self, mode: bool = True) -> "Classifier":
        """Training or evaluation mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def check_size(self, images: Tensor) -> None:
        """Raise unless images (B, C, H, W) have the channels and the size that the backbone was built for."""
        check_size(images, self.in_chans, self.image_size)

    def features(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """Pooled features of normalized images."""
        self.check_size(images)
        return self.backbone(images)

    def forward(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        """Logits of normalized images."""
        return linear(self.head, self.head_norm(self.features(images)))


def _backbone_by_name(name: str, options: dict[str, Any], pretrained: bool, weights: str | None) -> Any:
    """A backbone without a head, of a pretraining run or of timm, with its weights."""
    from_run = is_file(name)
    if pretrained and (from_run or weights is not None):
        raise ValueError("Expected no `pretrained` beside weights from a run or a file, got True.")
    if from_run:
        if weights is not None:
            raise ValueError(f"Expected no `weights` beside a `backbone` that is a run, got {weights}.")
        return pretrained_encoder(name, "backbone", options)
    backbone = named_backbone(name, {"pretrained": pretrained, **options})
    if weights is not None:
        load_encoder(backbone, sound_checkpoint(Path(weights)))
    return backbone


def named_backbone(name: str, options: dict[str, Any]) -> Any:
    """A timm model by name, without a head; `img_size` is left out where the architecture takes images of any size."""
    try:
        return timm_model("backbone", name, {"num_classes": 0, **options})
    except ValueError as error:
        if "unexpected keyword argument 'img_size'" not in str(error):
            raise
        del options["img_size"]
        return timm_model("backbone", name, {"num_classes": 0, **options})


def feature_size(backbone: nn.Module) -> int:
    """Size of the pooled features that a backbone without a head gives.

    Raises:
        ValueError: It does not say.
    """
    # timm's models that have a hidden layer in their head give that layer, of another size than `num_features`.
    for name in ("head_hidden_size", "num_features", "embed_dim"):
        if isinstance(size := getattr(backbone, name, None), int):
            return size
    kind = type(backbone).__name__
    raise ValueError(f"Expected a `backbone` that states its `num_features` or `embed_dim`, got a {kind}.")


def _channels(backbone: nn.Module) -> int | None:
    """Channels that the first convolution reads; None where there is no convolution."""
    return next((layer.in_channels for layer in backbone.modules() if isinstance(layer, nn.Conv2d)), None)


def _fixed_size(backbone: Any) -> tuple[int, int] | None:
    """Height and width that a backbone is built for; None where it takes any."""
    embed = getattr(backbone, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    return pair(size) if size is not None and getattr(embed, "strict_img_size", True) else None


def _agreed(argument: str, given: Any, own: Any) -> Any:
    if None not in (given, own) and given != own:
        raise ValueError(f"Expected `{argument}` {own}, that of the `backbone`, got {given}.")
    return own if given is None else given
