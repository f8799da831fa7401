"""Losses over named features; ids say which image and text belong together.

Every loss takes `(image_features, text_features, logit_scale=None, logit_bias=None, *,
image_id=None, text_id=None)` with features (I, D) and (T, D), normalized, and returns a scalar.
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

# --- Matches by id ---


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
            "give one id per row."
        )
    return (image_id[:, None] == text_id[None, :]) & (image_id[:, None] != -1)


class MatchLoss(nn.Module):
    """Base of the losses: turns ids into matches; a subclass computes the loss from features and matches."""

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
        return self.loss(
            image_features, text_features, matches.to(image_features.device), logit_scale, logit_bias
        )

    def loss(self, images: Tensor, texts: Tensor, matches: Tensor, scale: Any, bias: Any) -> Tensor:
        """Args: images: (I, D). texts: (T, D). matches: (I, T) bool. scale, bias: of the logits, or None."""
        raise NotImplementedError


# --- Margins ---


class MarginLoss(MatchLoss):
    """Cosines in both directions, averaged over queries; a subclass defines the loss of one direction."""

    def loss(self, images: Tensor, texts: Tensor, matches: Tensor, scale: Any, bias: Any) -> Tensor:
        if not matches.any():
            return 0.0 * (images.sum() + texts.sum())  # a zero with a gradient
        scores = full_precision(images @ texts.T)  # (I, T)
        return (self.direction(scores, matches) + self.direction(scores.T, matches.T)) / 2

    def direction(self, scores: Tensor, matches: Tensor) -> Tensor:
        """The loss of queries (Q) against a gallery (G), from (Q, G) cosines and matches."""
        raise NotImplementedError


class ContrastiveLoss(MarginLoss):
    """Matches are pulled together; each query's hardest negatives are pushed to a cosine distance of `margin`.

    The mean distance of the matches, plus the mean amount by which the chosen negatives are closer than the margin;
    distances are 1 - cosine.

    Args:
        margin: cosine distance beyond which a negative has no loss.
        num_hard_negatives: nearest negatives counted per query; all of them where there are fewer.
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
        margin: difference of cosines.
        triplet_mining: which negatives count. `mean`: all, averaged. `hardest`: the nearest one.
            `semi_hard`: the nearest of those farther than the match, or the farthest one where there is none.
        triplet_warmup_epochs: first epochs with `mean`; the hardest negatives alone collapse an untrained model.
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
"""The loss of each match, (M,), from its score (M,), its query's scores and negatives, (M, G), and the margin."""


class LabelledLoss(nn.Module):
    """Your own loss with `forward(image_features, text_features, labels)`, for `fit`.

    Row i of images and row i of texts belong together; labels (N,) are the images' ids.

    Args:
        loss: gives a scalar.
    Raises: LabError, when called, if an image does not have exactly one caption.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        *_: Any,
        image_id: Tensor | None = None,
        text_id: Tensor | None = None,
        **__: Any,
    ) -> Tensor:
        labels = torch.arange(len(image_features)) if image_id is None else image_id
        pairs = labels if text_id is None else text_id
        if len(text_features) != len(labels) or not torch.equal(labels, pairs):
            raise LabError(
                f"a loss over labels takes one caption per image, not {len(text_features)} for {len(labels)}; "
                "set captions_per_image to 1 and mining to 'none'."
            )
        return self.loss(image_features, text_features, labels.to(image_features.device))


def with_ids(loss: nn.Module) -> nn.Module:
    """A loss that takes ids: the loss itself, or a `LabelledLoss` where it takes `labels`."""
    takes_labels = "labels" in inspect.signature(loss.forward).parameters
    return LabelledLoss(loss) if takes_labels else loss


class SwapMarginLoss(nn.Module):
    """Another loss, plus a margin between an image's own caption and the caption with left and right swapped.

    The other loss does not see the swapped captions: a swapped caption may be the right one of another image.
    Images of one class twice have no swapped caption and no such term.

    Args:
        loss: called with all other rows.
        swap_weight: weight of the margin term.
        swap_margin: how much nearer the right order must be, cosine.
    Source: the hinge of VSE, Kiros et al. 2014, eq. 1, with one chosen negative.
    """

    def __init__(self, loss: nn.Module, swap_weight: float = 1.0, swap_margin: float = 0.2) -> None:
        super().__init__()
        self.loss, self.weight, self.margin = loss, swap_weight, swap_margin

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to a loss that depends on it."""
        if hasattr(self.loss, "set_epoch"):
            self.loss.set_epoch(epoch)  # type: ignore[operator]

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        *logits: Any,
        image_id: Tensor | None = None,
        text_id: Tensor | None = None,
        **named_logits: Any,
    ) -> Tensor:
        if image_id is None or text_id is None:
            return self.loss(image_features, text_features, *logits, **named_logits)
        own = text_id > SWAPPED
        named = {"image_id": image_id, "text_id": text_id[own], **named_logits}
        others = self.loss(image_features, text_features[own], *logits, **named)
        return others + self.weight * self._margin(image_features, text_features, image_id, text_id)

    def chance(self, image_id: Tensor, text_id: Tensor, logit_bias: Tensor | None = None) -> Any:
        """The other loss's, plus the whole margin, as equal scores differ by nothing."""
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


def _find(searched: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The first position of each searched id in `ids`, and whether it is there at all."""
    same = searched[:, None] == ids[None, :]  # (I, T)
    return same.to(torch.uint8).argmax(dim=1), same.any(dim=1)


# --- InfoNCE, sigmoid, and the table of losses ---


SCORES_AT_ONCE = (
    1 << 25
)  # 128 MiB of float32: a larger gallery is scored in pieces, recomputed in the backward pass


def in_pieces(score: Callable[..., Any], queries: Tensor, gallery: Tensor, matches: Tensor) -> list[Any]:
    """`score(queries, some of the gallery, the same columns of matches)`, in bounded memory.

    Args: queries: (Q, D); gallery: (G, D); matches: (Q, G).
    """
    columns = max(1, SCORES_AT_ONCE // max(1, len(queries)))
    if len(gallery) <= columns:
        return [score(queries, gallery, matches)]
    pieces = zip(gallery.split(columns), matches.split(columns, dim=1), strict=True)
    return [checkpoint(score, queries, some, mask, use_reentrant=False) for some, mask in pieces]


class InfoNCELoss(MatchLoss):
    """Symmetric softmax loss; several captions of an image share its target.

    Args:
        temperature: used only when called without a `logit_scale`.
        label_smoothing: share of each target spread over the gallery.
        focal_gamma: queries are weighted by (1 - probability of their matches) to this power.
    Source: CLIP, Radford et al. 2021, figure 3; several matches per row as in SupCon's L_out, Khosla et al. 2020,
        eq. 2; focal weights, Lin et al. 2017, eq. 4.
    """

    def __init__(
        self, temperature: float = 0.07, label_smoothing: float = 0.0, focal_gamma: float = 0.0
    ) -> None:
        super().__init__()
        self.temperature, self.label_smoothing, self.focal_gamma = temperature, label_smoothing, focal_gamma

    def loss(self, images: Tensor, texts: Tensor, matches: Tensor, scale: Any, bias: Any) -> Tensor:
        images, logits = (
            (1 / self.temperature if scale is None else scale) * images,
            None,
        )  # a bias changes nothing
        if matches.numel() <= SCORES_AT_ONCE:
            logits = full_precision(images @ texts.T)  # both directions read one product
        to_text = self._direction(images, texts, matches, logits)
        to_image = self._direction(texts, images, matches.T, None if logits is None else logits.T)
        return (to_text + to_image) / 2

    def chance(self, image_id: Tensor, text_id: Tensor, logit_bias: Tensor | None = None) -> float | None:
        """The value where all logits are equal; None with focal weights, where it depends on the matches."""
        return None if self.focal_gamma else (math.log(len(text_id)) + math.log(len(image_id))) / 2

    def _direction(self, queries: Tensor, gallery: Tensor, matches: Tensor, logits: Tensor | None) -> Tensor:
        """Mean cross-entropy of each query's softmax over the gallery; queries without a match have no term.

        Args: logits: (Q, G); None: computed piece by piece.
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
        """For each query: logsumexp of its logits, the sum over its matches, and with focal weights the logsumexp of
        its matches."""
        parts = logits.logsumexp(dim=1), (logits * matches).sum(dim=1)
        if not self.focal_gamma:
            return parts
        return *parts, logits.masked_fill(~matches, -math.inf).logsumexp(dim=1)


class SigmoidLoss(MatchLoss):
    """Each image-text pair is classified as match or non-match; summed over pairs, averaged over images.

    Args:
        temperature, logit_bias: used only when called without a `logit_scale` and `logit_bias`.
    Source: SigLIP, Zhai et al. 2023, algorithm 1.
    """

    def __init__(self, temperature: float = 0.1, logit_bias: float | None = None) -> None:
        super().__init__()
        self.temperature, self.logit_bias = temperature, logit_bias or 0.0

    def loss(self, images: Tensor, texts: Tensor, matches: Tensor, scale: Any, bias: Any) -> Tensor:
        scale = 1 / self.temperature if scale is None else scale
        bias = self.logit_bias if bias is None else bias
        queries = matches.any(dim=1)  # an image without a caption here is only in the gallery

        def sum_of(images: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
            logits = full_precision(images @ texts.T) + bias
            return -F.logsigmoid(torch.where(mask, logits, -logits)).sum()

        pieces = in_pieces(sum_of, scale * images, texts, matches)
        return torch.stack(pieces).sum() / queries.sum().clamp(min=1)

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
    """`chance_level` as a number or a tensor () on the device, so that a GPU does not wait."""
    chance = getattr(criterion, "chance", None)
    return None if chance is None else chance(image_id, text_id, logit_bias)


def chance_level(
    criterion: nn.Module, image_id: Tensor, text_id: Tensor, logit_bias: Tensor | None = None
) -> float | None:
    """The value of a loss for features that carry no information, as at the start of training.

    Args: image_id: (I,). text_id: (T,). logit_bias: the model's, if it has one.
    Returns: None for a loss without a method `chance(image_id, text_id, logit_bias)`.
    """
    level = loss_chance(criterion, image_id, text_id, logit_bias)
    return None if level is None else float(level)


def even_bias(batch_size: int) -> float:
    """The sigmoid loss's bias at the start: the log odds of a match in a batch of that many images.

    SigLIP's -10 suits a batch of 22,000; in a small batch it outweighs the matches.
    """
    return -math.log(max(1, batch_size - 1))


LOSSES: dict[str, type[nn.Module]] = {
    "infonce": InfoNCELoss,
    "sigmoid": SigmoidLoss,
    "contrastive": ContrastiveLoss,
    "triplet": TripletLoss,
}


def build_loss(config: Config) -> nn.Module:
    """The loss of a configuration; the parameters of its class are fields of the configuration."""
    make = choose(LOSSES, config.loss, "loss")
    loss = make(
        **{name: config[name] for name in inspect.signature(make).parameters if name in Config.model_fields}
    )
    return SwapMarginLoss(loss, config.swap_weight, config.swap_margin) if config.swap_weight else loss


def has_bias(config: Config) -> bool:
    """Whether the configuration's loss uses the model's logit_bias."""
    return config.loss == "sigmoid"
