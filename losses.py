"""Losses over named features; which image and text belong together is told by ids.

Every loss takes `(image_features, text_features, logit_scale=None, logit_bias=None, *,
image_id=None, text_id=None)` with features (I, D) and (T, D), normalised, and returns a scalar.
An image and a text match if and only if their ids are equal; id -1 matches nothing; a row without
a match is only a negative. Without ids, row i matches row i.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import LabError


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


def spread_cross_entropy(logits: Tensor, matches: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each row's softmax against a target spread evenly over the row's matches.

    Args:
        logits: (Q, G) scores of a gallery for each query.
        matches: (Q, G) bool. Rows without a match have no term.
        label_smoothing: share of the target spread over the whole gallery.
    Returns: scalar, the mean over rows with a match; 0 (with a gradient) if there is none.
    Source: SupCon's L_out, Khosla et al. 2020, eq. 2; with one match a row, `F.cross_entropy`.
    """
    log_probs = F.log_softmax(logits.float(), dim=1)  # (Q, G)
    counts = matches.sum(dim=1)  # (Q,)
    loss = -(log_probs * matches).sum(dim=1) / counts.clamp(min=1)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probs.mean(dim=1)
    has_match = counts > 0
    return (loss * has_match).sum() / has_match.sum().clamp(min=1)


class InfoNCELoss(nn.Module):
    """Symmetric softmax loss; several captions of an image share its target.

    Args:
        temperature: used only when called without a `logit_scale`.
        label_smoothing: share of each target spread over the gallery.
    Source: CLIP, Radford et al. 2021, figure 3; several matches a row as in SupCon's L_out.
    """

    def __init__(self, temperature: float = 0.07, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.label_smoothing = label_smoothing

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
        scale = 1 / self.temperature if logit_scale is None else logit_scale
        logits = scale * image_features @ text_features.T  # (I, T)
        if logit_bias is not None:
            logits = logits + logit_bias
        matches = match_mask(len(image_features), len(text_features), image_id, text_id).to(logits.device)
        smoothing = self.label_smoothing
        to_text = spread_cross_entropy(logits, matches, smoothing)
        to_image = spread_cross_entropy(logits.T, matches.T, smoothing)
        return (to_text + to_image) / 2


def uniform_loss(image_id: Tensor, text_id: Tensor) -> float:
    """InfoNCE's value where every logit is equal: what an untrained model should start near.

    Args: image_id: (I,). text_id: (T,).
    """
    return (
        torch.log(torch.tensor(float(len(text_id)))) + torch.log(torch.tensor(float(len(image_id))))
    ).item() / 2


LOSSES: dict[str, type[nn.Module]] = {"infonce": InfoNCELoss}
ALIASES: dict[str, str] = {"InfoNCELoss": "infonce", "softmax_infonce": "infonce", "info_nce": "infonce"}
