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

from core.devices import full_precision

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import Config
from core.errors import LabError, choose
from core.ids import SWAPPED

# --- Matches, told by ids ---


def match_mask(num_images: int, num_texts: int, image_id: Tensor | None, text_id: Tensor | None) -> Tensor:
    """(I, T) bool: which image and text belong together.

    Raises: LabError if ids and features differ in length, or no ids are given and I is not T.
    """
    if image_id is None or text_id is None:
        if num_images != num_texts:
            raise LabError(
                f"{num_images} images and {num_texts} texts need image_id and text_id to be matched."
            )
        return torch.eye(num_images, dtype=torch.bool)
    if len(image_id) != num_images or len(text_id) != num_texts:
        raise LabError(
            f"{num_images} images and {num_texts} texts came with {len(image_id)} and {len(text_id)} ids; "
            "give one id a row."
        )
    return (image_id[:, None] == text_id[None, :]) & (image_id[:, None] != -1)


# --- Margins ---


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
        scores = full_precision(image_features @ text_features.T)  # (I, T)
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

    def chance(self, image_id: Tensor, text_id: Tensor, logit_bias: Tensor | None = None) -> Any:
        """The other loss's, and the margin that equal scores fall short of."""
        others = loss_chance(self.loss, image_id, text_id[text_id > SWAPPED], logit_bias)
        return None if others is None else others + self.weight * self.margin

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


# --- InfoNCE, sigmoid, and the table of losses ---


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
        images, logits = scale * image_features, None
        if matches.numel() <= SCORES_AT_ONCE:
            logits = full_precision(images @ text_features.T)  # both directions read one product
        to_text = self._direction(images, text_features, matches, logits)
        to_image = self._direction(text_features, images, matches.T, None if logits is None else logits.T)
        return (to_text + to_image) / 2

    def chance(self, image_id: Tensor, text_id: Tensor, logit_bias: Tensor | None = None) -> float | None:
        """The value where all logits are equal; None with focal weights, which change it with every match."""
        return None if self.focal_gamma else (math.log(len(text_id)) + math.log(len(image_id))) / 2

    def _direction(self, queries: Tensor, gallery: Tensor, matches: Tensor, logits: Tensor | None) -> Tensor:
        """Mean cross-entropy of each query's softmax over the gallery; queries without a match have no term.

        Args: logits: (Q, G), made piece by piece where there are none.
        """
        has_match = matches.any(dim=1)
        if not has_match.all():
            queries, matches = queries[has_match], matches[has_match]
            logits = None if logits is None else logits[has_match]
        if not len(queries):
            return 0.0 * (queries.sum() + gallery.sum())  # a zero with a gradient
        if logits is None:
            pieces = in_pieces(self._scored, queries, gallery, matches)
        else:
            pieces = [self._parts(logits, matches)]
        log_total, own, *log_own = (torch.stack(part) for part in zip(*pieces, strict=True))
        log_total = log_total.logsumexp(dim=0)
        loss = log_total - own.sum(dim=0) / matches.sum(dim=1)  # (Q,)
        if self.label_smoothing:
            everywhere = log_total - full_precision(queries) @ full_precision(gallery).mean(dim=0)
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * everywhere
        if self.focal_gamma:
            wrong = -torch.expm1(log_own[0].logsumexp(dim=0) - log_total)
            loss = wrong.clamp(min=1e-7) ** self.focal_gamma * loss
        return loss.mean()

    def _scored(self, queries: Tensor, gallery: Tensor, matches: Tensor) -> tuple[Tensor, ...]:
        return self._parts(full_precision(queries @ gallery.T), matches)

    def _parts(self, logits: Tensor, matches: Tensor) -> tuple[Tensor, ...]:
        """Of each query's logits: log of the sum of exponentials, the matches' sum, and the first over matches alone
        where the focal weights want it."""
        parts = logits.logsumexp(dim=1), (logits * matches).sum(dim=1)
        if not self.focal_gamma:
            return parts
        return *parts, logits.masked_fill(~matches, -math.inf).logsumexp(dim=1)


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
            logits = full_precision(queries @ gallery.T) + bias
            return -F.logsigmoid(torch.where(mask, logits, -logits)).sum()

        pieces = in_pieces(loss_of, scale * image_features, text_features, matches)
        return torch.stack(pieces).sum() / keep.sum().clamp(min=1)

    def chance(self, image_id: Tensor, text_id: Tensor, logit_bias: Tensor | None = None) -> Tensor:
        """The value where every logit is the bias, as with unrelated features."""
        matches = match_mask(len(image_id), len(text_id), image_id, text_id)
        bias = (
            torch.as_tensor(self.logit_bias if logit_bias is None else logit_bias).detach().to(matches.device)
        )
        match, other = matches.sum(), (~matches).sum()
        return (match * F.softplus(-bias) + other * F.softplus(bias)) / matches.any(dim=1).sum().clamp(min=1)


def loss_chance(
    criterion: nn.Module, image_id: Tensor, text_id: Tensor, logit_bias: Tensor | None = None
) -> Any:
    """`chance_level`, of a loss that reads ids as a tensor () on their device, so that a GPU need not wait."""
    chance = getattr(criterion, "chance", None)
    return None if chance is None else chance(image_id, text_id, logit_bias)


def chance_level(
    criterion: nn.Module, image_id: Tensor, text_id: Tensor, logit_bias: Tensor | None = None
) -> float | None:
    """The value of a loss at the start, where no image is nearer to its text than to another.

    Args: image_id: (I,). text_id: (T,). logit_bias: the model's, where it has one.
    Returns: None of a loss that has no such value, or does not state it by a method `chance` of the same arguments.
    """
    level = loss_chance(criterion, image_id, text_id, logit_bias)
    return None if level is None else float(level)


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


def build_loss(config: Config) -> nn.Module:
    """The loss of a configuration; it is given the fields its class names, under their own names."""
    make = choose(LOSSES, config.loss, "loss")
    taken = inspect.signature(make).parameters
    loss = make(**{name: config[name] for name in taken if name in Config.model_fields})
    return SwapMarginLoss(loss, config.swap_weight, config.swap_margin) if config.swap_weight else loss


def has_bias(config: Config) -> bool:
    """Whether the configuration's loss wants the model to hold a logit_bias."""
    return config.loss == "sigmoid"
