"""Transformer blocks at either end of the full decoder, where less than all tokens has to be computed.

Shape suffixes: B batch, K known tokens, M masked tokens, N patches, E width.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from masklr.models.attention import FastAttention, accelerate
from masklr.models.fast_linear import linear
from masklr.models.own_gradients import is_bare, own_gradients_wanted


class _WithRowsOfTable(torch.autograd.Function):
    """Tokens, and after them rows of a table by index; gradients of a row are summed in the order of its places."""

    @staticmethod
    def forward(ctx: Any, known: Tensor, table: Tensor, index: Tensor) -> Tensor:
        batch, num_known, width = known.shape
        ctx.save_for_backward(index)
        ctx.sizes = num_known, len(table)
        out = known.new_empty(batch, num_known + index.shape[1], width)
        out[:, :num_known] = known
        out[:, num_known:] = table.index_select(0, index.flatten()).view(batch, -1, width)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (index,) = ctx.saved_tensors
        num_known, num_rows = ctx.sizes
        named, places = index.flatten().sort(stable=True)
        places += (places // index.shape[1] + 1) * num_known
        starts = torch.searchsorted(named, torch.arange(num_rows))
        grad_table = nn.functional.embedding_bag(places, grad.reshape(-1, grad.shape[-1]), starts, mode="sum")
        return grad[:, :num_known], grad_table, None


class _FastBlock(Block):
    """timm's transformer `Block` with its layers served by the fastest way."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        accelerate(self)


class FirstTokensBlock(_FastBlock):
    """timm's transformer `Block`, for tokens of which the last are alike wherever they name the same patch.

    A mask token is the same for each image of a batch but for its position, so before attention mixes them, on CPUs its
    norm and its query, key and value are computed once for each position. Results and gradients are the full block's.
    """

    def forward(  # type: ignore[override]
        self,
        known: Float[Tensor, "B K E"],
        masked: Float[Tensor, "B M E"],
        table: Float[Tensor, "N E"],
        index: Int[Tensor, "B M"],
    ) -> Float[Tensor, "B K_and_M E"]:
        """All tokens after the block.

        Args:
            known: Tokens that differ from image to image.
            masked: The others: rows of the table by the index.
            table: Mask tokens, one for each patch.
            index: Patches that the masked tokens stand for.
        """
        x = torch.cat([known, masked], dim=1)
        attn: Any = self.attn
        repeated = index.numel() > len(table)
        if not (repeated and own_gradients_wanted(x) and self._treats_tokens_alone(attn)):
            return super().forward(x)
        rows = linear(attn.qkv, self.norm1(torch.cat([known.flatten(0, 1), table])))
        of_known, of_table = rows.split([len(rows) - len(table), len(table)])
        qkv = _WithRowsOfTable.apply(of_known.view(*known.shape[:2], -1), of_table, index)
        x = x + self.drop_path1(self.ls1(attn.of_projected(qkv)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _treats_tokens_alone(self, attn: Any) -> bool:
        """Whether norm and projection are timm's own, so that no token depends on another, and have no listener."""
        own = is_bare(self.norm1, nn.LayerNorm, LayerNorm) and is_bare(attn, FastAttention)
        return own and attn.is_plain and is_bare(attn.qkv, nn.Linear)


class LastTokensBlock(_FastBlock):
    """timm's transformer `Block`, for where only the last tokens it gives are read: it computes no others.

    Keys and values still come from all tokens, so that the result and its gradients are the full block's.
    """

    def forward(self, x: Tensor, last: int) -> Tensor:  # type: ignore[override]
        """The last `last` tokens after the block; x is (batch, tokens, width)."""
        attended = self.drop_path1(self.ls1(self.attn(self.norm1(x), last=last)))
        x = x[:, -last:] + attended
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
