"""Lab 5: a solution of each exercise, as in notebooks/5_write_it_yourself.ipynb. Try first, read afterwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention_pooling(feature_map: Tensor, score: nn.Module) -> Tensor:
    positions = feature_map.flatten(2).transpose(1, 2)  # (B, hw, C)
    weights = score(positions).softmax(dim=1)  # (B, hw, 1)
    return (positions * weights).sum(dim=1)  # (B, C)


def projection_head(width: int, hidden_dim: int, embed_dim: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.GELU(),
        nn.Linear(hidden_dim, embed_dim),
        nn.BatchNorm1d(embed_dim),
    )


def info_nce(
    image_features: Tensor, text_features: Tensor, logit_scale: float, image_id: Tensor, text_id: Tensor
) -> Tensor:
    logits = logit_scale * image_features @ text_features.T  # (I, T)
    matches = (image_id[:, None] == text_id[None, :]).float()
    to_text = -(logits.log_softmax(dim=1) * matches).sum(dim=1) / matches.sum(dim=1)  # (I,)
    to_image = -(logits.log_softmax(dim=0) * matches).sum(dim=0) / matches.sum(dim=0)  # (T,)
    return (to_text.mean() + to_image.mean()) / 2


def hard_negatives(
    image_features: Tensor, text_features: Tensor, image_id: Tensor, text_id: Tensor, k: int
) -> Tensor:
    scores = image_features @ text_features.T  # (I, T)
    scores = scores.masked_fill(image_id[:, None] == text_id[None, :], -torch.inf)
    return scores.topk(k, dim=1).indices


def recall_at_k(
    image_features: Tensor, text_features: Tensor, image_id: Tensor, text_id: Tensor, k: int
) -> Tensor:
    scores = text_features @ image_features.T  # (T, I)
    matches = text_id[:, None] == image_id[None, :]
    own = scores.masked_fill(~matches, -torch.inf).amax(dim=1, keepdim=True)  # (T, 1)
    rank = 1 + ((scores >= own) & ~matches).sum(dim=1)
    return (rank <= k).float().mean()


def zero_shot(image_features: Tensor, prompt_features: Tensor, logit_scale: float) -> Tensor:
    labels = F.normalize(prompt_features.mean(dim=1), dim=1)  # (L, D)
    return (logit_scale * image_features @ labels.T).softmax(dim=1)


def two_passes(encoder: nn.Module, loss: Callable[[Tensor], Tensor], images: Tensor, piece_size: int) -> None:
    pieces = images.split(piece_size)
    with torch.no_grad():
        features = torch.cat([encoder(piece) for piece in pieces])
    loss(features.requires_grad_()).backward()
    for piece, gradient in zip(pieces, features.grad.split(piece_size), strict=True):
        encoder(piece).backward(gradient)


def interval_over_images(hits: Tensor, image_id: Tensor, draws: Tensor) -> Tensor:
    num_images = draws.shape[1]
    sums = torch.zeros(num_images).index_add(0, image_id, hits)
    counts = torch.bincount(image_id, minlength=num_images)
    recalls = sums[draws].sum(dim=1) / counts[draws].sum(dim=1)  # (B,)
    return recalls.quantile(torch.tensor([0.025, 0.975]))
