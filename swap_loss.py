"""A margin between a pair's caption and the same caption with left and right swapped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SWAPPED = -2
"""A text of id `SWAPPED - image_id` is the caption of that image with left and right swapped: it matches nothing."""


class SwapMarginLoss(nn.Module):
    """Another loss, plus how far the right order falls short of its margin over the swapped one.

    The swapped captions are kept from the other loss: there the caption of one image swapped may be the right one
    of another. Images without a swapped caption, of one class twice, have no term.

    Args:
        loss: called with every other row.
        swap_weight: of the margin's term.
        swap_margin: how much nearer the right order must be, cosine.
    Source: the hinge of VSE, Kiros et al. 2014, eq. 1, with one chosen negative.
    """

    def __init__(self, loss: nn.Module, swap_weight: float = 1.0, swap_margin: float = 0.2) -> None:
        super().__init__()
        self.loss, self.weight, self.margin = loss, swap_weight, swap_margin

    def set_epoch(self, epoch: int) -> None:
        """Tell the other loss, where it wants to know."""
        if hasattr(self.loss, "set_epoch"):
            self.loss.set_epoch(epoch)  # type: ignore[operator]

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | None = None,
        logit_bias: Tensor | None = None,
        *,
        image_id: Tensor | None = None,
        text_id: Tensor | None = None,
    ) -> Tensor:
        if image_id is None or text_id is None:
            return self.loss(image_features, text_features, logit_scale, logit_bias)
        kept = text_id > SWAPPED
        others = self.loss(
            image_features,
            text_features[kept],
            logit_scale,
            logit_bias,
            image_id=image_id,
            text_id=text_id[kept],
        )
        return others + self.weight * self._margin(image_features, text_features, image_id, text_id)

    def _margin(self, images: Tensor, texts: Tensor, image_id: Tensor, text_id: Tensor) -> Tensor:
        """Mean shortfall over the images whose own and swapped captions are both in the batch."""
        own, has_own = _find(image_id, text_id)
        swapped, has_swapped = _find(SWAPPED - image_id, text_id)
        both = has_own & has_swapped
        if not both.any():
            return 0.0 * images.sum()  # a zero with a gradient
        some = images[both]
        gap = (some * (texts[own[both]] - texts[swapped[both]])).sum(dim=1)
        return F.relu(self.margin - gap).mean()


def _find(wanted: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where each wanted id stands first among `ids`, and whether it does."""
    same = wanted[:, None] == ids[None, :]  # (I, T)
    return same.to(torch.uint8).argmax(dim=1), same.any(dim=1)
