"""Losses over named features; which image and text belong together is told by ids.

Every loss takes `(image_features, text_features, logit_scale=None, logit_bias=None, *,
image_id=None, text_id=None)` with features (I, D) and (T, D), normalised, and returns a scalar.
An image and a text match if and only if their ids are equal; id -1 matches nothing; a row without
a match is only a negative. Without ids, row i matches row i.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import Config
from errors import choose
from margin_losses import ContrastiveLoss, TripletLoss
from matching import match_mask
from swap_loss import SwapMarginLoss

SCORES_AT_ONCE = 1 << 25  # 128 MiB of float32: a larger gallery passes in pieces, recomputed backwards


def in_pieces(score: Callable[..., Any], queries: Tensor, gallery: Tensor, matches: Tensor) -> list[Any]:
    """`score(queries, some of the gallery, the same columns of matches)`, in bounded memory.

    Args: queries: (Q, D); gallery: (G, D); matches: (Q, G).
    """
    columns = max(1, SCORES_AT_ONCE // max(1, len(queries)))
    if len(gallery) <= columns:
        return [score(queries, gallery, matches)]
    pieces = zip(gallery.split(columns), matches.split(columns, dim=1), strict=True)
    return [checkpoint(score, queries, some, mask, use_reentrant=False) for some, mask in pieces]


class InfoNCELoss(nn.Module):
    """Symmetric softmax loss; several captions of an image share its target.

    Args:
        temperature: used only when called without a `logit_scale`.
        label_smoothing: share of each target spread over the gallery.
        focal_gamma: queries are weighted by (1 - probability of their matches) to this power.
    Source: CLIP, Radford et al. 2021, figure 3; several matches a row as SupCon's L_out, Khosla et al. 2020,
        eq. 2; focal weights, Lin et al. 2017, eq. 4.
    """

    def __init__(
        self, temperature: float = 0.07, label_smoothing: float = 0.0, focal_gamma: float = 0.0
    ) -> None:
        super().__init__()
        self.temperature, self.label_smoothing, self.focal_gamma = temperature, label_smoothing, focal_gamma

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | None = None,
        logit_bias: Tensor | None = None,  # softmax does not change with a bias
        *,
        image_id: Tensor | None = None,
        text_id: Tensor | None = None,
    ) -> Tensor:
        matches = match_mask(len(image_features), len(text_features), image_id, text_id)
        matches = matches.to(image_features.device)
        scale = 1 / self.temperature if logit_scale is None else logit_scale
        to_text = self._direction(scale * image_features, text_features, matches)
        to_image = self._direction(scale * text_features, image_features, matches.T)
        return (to_text + to_image) / 2

    def _direction(self, queries: Tensor, gallery: Tensor, matches: Tensor) -> Tensor:
        """Mean cross-entropy of each query's softmax over the gallery; queries without a match have no term."""
        has_match = matches.any(dim=1)
        if not has_match.all():
            queries, matches = queries[has_match], matches[has_match]
        if not len(queries):
            return 0.0 * (queries.sum() + gallery.sum())  # a zero with a gradient
        pieces = in_pieces(_softmax_parts, queries, gallery, matches)
        log_total, log_own = (
            torch.stack(part).logsumexp(dim=0)
            for part in zip(*[(total, own) for total, own, _ in pieces], strict=True)
        )
        own = torch.stack([part for *_, part in pieces]).sum(dim=0) / matches.sum(dim=1)
        loss = log_total - own  # (Q,)
        if self.label_smoothing:
            everywhere = log_total - queries.float() @ gallery.float().mean(dim=0)
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * everywhere
        if self.focal_gamma:
            loss = (-torch.expm1(log_own - log_total)).clamp(min=1e-7) ** self.focal_gamma * loss
        return loss.mean()


def _softmax_parts(queries: Tensor, gallery: Tensor, matches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each query's logits: log of the sum of exponentials, the same over matches, and the matches' sum."""
    logits = (queries @ gallery.T).float()  # (Q, G)
    own = logits.masked_fill(~matches, -math.inf).logsumexp(dim=1)
    return logits.logsumexp(dim=1), own, (logits * matches).sum(dim=1)


class SigmoidLoss(nn.Module):
    """Every image and text are told apart as a match or not, each on its own; the sum over pairs, an image.

    Args:
        temperature, logit_bias: used only when called without a `logit_scale` and `logit_bias`.
    Source: SigLIP, Zhai et al. 2023, algorithm 1.
    """

    def __init__(self, temperature: float = 0.1, logit_bias: float | None = None) -> None:
        super().__init__()
        self.temperature, self.logit_bias = temperature, logit_bias or 0.0

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
        matches = match_mask(len(image_features), len(text_features), image_id, text_id)
        matches = matches.to(image_features.device)
        scale = 1 / self.temperature if logit_scale is None else logit_scale
        bias = self.logit_bias if logit_bias is None else logit_bias
        keep = matches.any(dim=1)  # an image without a caption here is a gallery's, not a query

        def loss_of(queries: Tensor, gallery: Tensor, mask: Tensor) -> Tensor:
            logits = (queries @ gallery.T).float() + bias
            return -F.logsigmoid(torch.where(mask, logits, -logits)).sum()

        pieces = in_pieces(loss_of, scale * image_features, text_features, matches)
        return torch.stack(pieces).sum() / keep.sum().clamp(min=1)


def uniform_loss(image_id: Tensor, text_id: Tensor) -> float:
    """InfoNCE's value where every logit is equal: what an untrained model should start near.

    Args: image_id: (I,). text_id: (T,).
    """
    return (math.log(len(text_id)) + math.log(len(image_id))) / 2


def even_bias(batch_size: int) -> float:
    """The sigmoid loss's bias at the start: the log odds of a match in a batch of that many images.

    SigLIP's -10 is that of a batch of 22,000; in a small one it buries the matches.
    """
    return -math.log(max(1, batch_size - 1))


LOSSES: dict[str, type[nn.Module]] = {
    "infonce": InfoNCELoss,
    "sigmoid": SigmoidLoss,
    "contrastive": ContrastiveLoss,
    "triplet": TripletLoss,
}
ALIASES: dict[str, str] = {
    "InfoNCELoss": "infonce",
    "softmax_infonce": "infonce",
    "info_nce": "infonce",
    "queue_infonce": "infonce",
    "sigmoid_infonce": "sigmoid",
}
"""Documented names of the same losses; a queue is `negatives: queue`."""


def build_loss(config: Config) -> nn.Module:
    """The loss of a configuration; it is given the fields its class names, under their own names."""
    make = choose(LOSSES, ALIASES.get(config.loss, config.loss), "loss")
    taken = inspect.signature(make).parameters
    loss = make(**{name: config[name] for name in taken if name in Config.model_fields})
    return SwapMarginLoss(loss, config.swap_weight, config.swap_margin) if config.swap_weight else loss


def has_bias(config: Config) -> bool:
    """Whether the configuration's loss wants the model to hold a logit_bias."""
    return ALIASES.get(config.loss, config.loss) == "sigmoid"
