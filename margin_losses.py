"""Losses that hold matches and negatives apart by a margin, and an adapter for a loss of one's own.

They take what every loss of `losses.py` takes; their scores are cosines, so `logit_scale` and
`logit_bias` count for nothing. Rows without a match are only negatives, in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from errors import LabError, choose
from matching import match_mask


def no_loss(image_features: Tensor, text_features: Tensor) -> Tensor:
    """A zero with a gradient, for a batch that has nothing to compare."""
    return 0.0 * (image_features.sum() + text_features.sum())


class MarginLoss(nn.Module):
    """Scores and matches both ways, each query's terms averaged; a subclass says what a direction costs."""

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
        if not matches.any():
            return no_loss(image_features, text_features)
        scores = (image_features @ text_features.T).float()  # (I, T)
        return (self.direction(scores, matches) + self.direction(scores.T, matches.T)) / 2

    def direction(self, scores: Tensor, matches: Tensor) -> Tensor:
        """The loss of queries (Q) against a gallery (G), from (Q, G) cosines and matches."""
        raise NotImplementedError


class ContrastiveLoss(MarginLoss):
    """Matches are drawn together; each query's hardest negatives are pushed to a cosine distance of `margin`.

    The mean over matches of their distance, and the mean over the negatives chosen of how much they lack
    to the margin; distances are 1 - cosine.

    Args:
        margin: cosine distance from which on a negative costs nothing.
        num_hard_negatives: the nearest wrong ones of each query that count; all, where there are fewer.
    Source: Hadsell, Chopra & LeCun 2006, eq. 4, with the distance instead of its square.
    """

    def __init__(self, margin: float = 0.5, num_hard_negatives: int = 3) -> None:
        super().__init__()
        self.margin, self.num_hard_negatives = margin, num_hard_negatives

    def direction(self, scores: Tensor, matches: Tensor) -> Tensor:
        pull = (1 - scores[matches]).mean()
        queries = matches.any(dim=1)
        wrong = scores[queries].masked_fill(matches[queries], -math.inf)  # (Q, G)
        hardest = wrong.topk(min(self.num_hard_negatives, wrong.shape[1]), dim=1).values
        short = (hardest[hardest.isfinite()] - (1 - self.margin)).clamp(min=0)
        return pull + short.mean() if len(short) else pull


class TripletLoss(MarginLoss):
    """Every match must be nearer than the query's negatives by `margin`; the mean over matches.

    Args:
        margin: by how much nearer, cosine.
        triplet_mining: which negatives count. `mean`: all, averaged. `hardest`: the nearest one.
            `semi_hard`: the nearest of those farther than the match, or the farthest one where there is none.
        triplet_warmup_epochs: first epochs with `mean`: the hardest alone collapses an untrained model.
    Source: `mean` and `hardest`, Faghri et al. 2018, eq. 5 and 6; `semi_hard`, Schroff et al. 2015, eq. 4.
    """

    def __init__(
        self, margin: float = 0.5, triplet_mining: str = "hardest", triplet_warmup_epochs: int = 0
    ) -> None:
        super().__init__()
        choose(HINGES, triplet_mining, "triplet_mining")
        self.margin, self.triplet_mining, self.warmup = margin, triplet_mining, triplet_warmup_epochs
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's negatives."""
        self.hinge = HINGES["mean" if epoch < self.warmup else self.triplet_mining]

    def direction(self, scores: Tensor, matches: Tensor) -> Tensor:
        query, _ = matches.nonzero(as_tuple=True)  # (M,) one for each match
        own, wrong = scores[matches], ~matches  # (M,), (Q, G)
        some = wrong.any(dim=1)[query]  # a query may match its whole gallery
        if not some.any():
            return 0.0 * own.sum()
        return self.hinge(own[some], scores[query[some]], wrong[query[some]], self.margin).mean()


def _mean(own: Tensor, scores: Tensor, wrong: Tensor, margin: float) -> Tensor:
    short = (margin + scores - own[:, None]).clamp(min=0) * wrong  # (M, G)
    return short.sum(dim=1) / wrong.sum(dim=1)


def _hardest(own: Tensor, scores: Tensor, wrong: Tensor, margin: float) -> Tensor:
    nearest = scores.masked_fill(~wrong, -math.inf).amax(dim=1)  # (M,)
    return (margin + nearest - own).clamp(min=0)


def _semi_hard(own: Tensor, scores: Tensor, wrong: Tensor, margin: float) -> Tensor:
    farther = scores.masked_fill(~wrong | (scores >= own[:, None]), -math.inf).amax(dim=1)  # (M,)
    farthest = scores.masked_fill(~wrong, math.inf).amin(dim=1)
    return (margin + torch.where(farther.isfinite(), farther, farthest) - own).clamp(min=0)


HINGES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "mean": _mean,
    "semi_hard": _semi_hard,
    "hardest": _hardest,
}
"""What each match costs, (M,): from its score (M,), its query's scores and which are wrong, (M, G), and the margin."""


class LabelledLoss(nn.Module):
    """A loss of one's own with `forward(image_features, text_features, labels)`, for `fit`.

    Row i of images and row i of texts belong together; labels (N,) are the images' ids.

    Args:
        loss: gives a scalar.
    Raises: LabError, when called, if an image brings more or fewer than one caption.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

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
        labels = torch.arange(len(image_features)) if image_id is None else image_id
        pairs = labels if text_id is None else text_id
        if len(text_features) != len(labels) or not torch.equal(labels, pairs):
            raise LabError(
                f"a loss over labels takes one caption an image, not {len(text_features)} for {len(labels)}; "
                "set captions_per_image to 1 and mining to 'none'."
            )
        return self.loss(image_features, text_features, labels.to(image_features.device))
