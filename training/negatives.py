"""Negatives from outside the batch: recent features, or every training caption."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from config import Config
from core.errors import LabError, choose
from core.ids import ImageTextDataset
from models import CLIPModel

Features = dict[str, Tensor]
CAPTIONS_AT_ONCE = 8192


class BatchNegatives:
    """The batch alone; base class of the others.

    A gallery that goes beyond the batch has no gradients at all. If only the batch's own rows in it had them, they
    would be pulled to their matches and never pushed away, and all features would drift to one side.
    """

    def comparisons(self, features: Features, image_id: Tensor, text_id: Tensor) -> list[Features]:
        """Features and ids to compare; the loss is the mean over the list."""
        return [{**features, "image_id": image_id, "text_id": text_id}]

    def after_step(self) -> None:
        """Called after each step."""

    def log(self) -> dict[str, float]:
        """Figures for the history."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class QueueNegatives(BatchNegatives):
    """Image and caption features of this and of recent batches, except older ones of an image in the batch.

    Args: size: number of images, and of captions, in the queue.
    Source: cross-batch memory, Wang et al. 2020; a gallery without gradients, MoCo, He et al. 2020.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: dict[str, Tensor] = {}
        self.fresh: dict[str, Tensor] = {}

    def comparisons(self, features: Features, image_id: Tensor, text_id: Tensor) -> list[Features]:
        (batch,) = super().comparisons(features, image_id, text_id)
        comparisons = [batch]
        for kind, ids in (("image", image_id), ("text", text_id)):
            rows = features[f"{kind}_features"].detach()
            self.fresh |= {f"{kind}_id": ids, f"{kind}_features": rows}
            old_ids = self.rows.get(f"{kind}_id", ids[:0])
            others = ~torch.isin(old_ids, image_id)
            old = self.rows.get(f"{kind}_features", rows[:0])[others]
            unmatched = torch.full_like(old_ids[others], -1)  # old rows are only negatives
            gallery = {f"{kind}_features": torch.cat([rows, old]), f"{kind}_id": torch.cat([ids, unmatched])}
            comparisons.append(batch | gallery)
        return comparisons

    def after_step(self) -> None:
        for name, rows in self.fresh.items():
            self.rows[name] = torch.cat([rows, self.rows.get(name, rows[:0])])[: self.size]

    def log(self) -> dict[str, float]:
        return {"queue_rows": float(len(self.rows.get("text_id", ())))}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]


class BankNegatives(BatchNegatives):
    """Every training caption, encoded from its cached features.

    If the text head is trained, the captions are encoded again every `refresh_steps` steps, without gradients
    and without dropout; `bank_staleness` in the history is the mean cosine distance between old and new features.

    Args:
        model: whose text head encodes.
        texts: (N, width) cached features of all training captions.
        text_id: (N,) ids of their images.
    """

    def __init__(self, model: CLIPModel, texts: Tensor, text_id: Tensor, refresh_steps: int) -> None:
        self.model, self.texts, self.refresh_steps = model, texts, refresh_steps
        self.device = model.logit_scale.device
        self.ids = text_id.to(self.device)
        self.is_trained = any(p.requires_grad for p in model.text_head.parameters())
        self.features: Tensor | None = None
        self.steps = 0
        self.staleness = 0.0
        self.encoded_by: dict[str, Tensor] = {}

    @torch.no_grad()
    def _encode(self) -> None:
        with in_eval_mode(self.model):
            pieces = [
                self.model.encode_text(rows.to(self.device)) for rows in self.texts.split(CAPTIONS_AT_ONCE)
            ]
        new = torch.cat(pieces)
        if self.features is not None:
            self.staleness = 1 - (new * self.features).sum(dim=1).mean().item()
        self.features = new
        self.encoded_by = {k: v.detach().clone() for k, v in self.model.text_head.state_dict().items()}

    def comparisons(self, features: Features, image_id: Tensor, text_id: Tensor) -> list[Features]:
        if self.features is None or (self.is_trained and self.steps % self.refresh_steps == 0):
            self._encode()
        assert self.features is not None
        (batch,) = super().comparisons(features, image_id, text_id)
        return [batch, batch | {"text_features": self.features, "text_id": self.ids}]

    def after_step(self) -> None:
        self.steps += 1

    def log(self) -> dict[str, float]:
        return {"bank_staleness": self.staleness} if self.is_trained else {}

    def state_dict(self) -> dict[str, Any]:
        # The head that encoded the bank is far smaller than the bank, and gives the same bits again.
        return {"steps": self.steps, "staleness": self.staleness, "encoded_by": self.encoded_by}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        if state["encoded_by"]:
            now = {k: v.clone() for k, v in self.model.text_head.state_dict().items()}
            self.model.text_head.load_state_dict(state["encoded_by"])
            self._encode()
            self.model.text_head.load_state_dict(now)
        self.staleness = state["staleness"]


@contextlib.contextmanager
def in_eval_mode(model: CLIPModel) -> Iterator[None]:
    """Within, the model is in eval mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _bank(config: Config, model: CLIPModel, dataset: ImageTextDataset) -> BatchNegatives:
    if dataset.text_features is None:
        raise LabError(
            "negatives 'bank' needs cached captions; set text_tower_mode to 'cached', or negatives to 'queue'."
        )
    ids = torch.from_numpy(dataset.caption_match_ids)
    return BankNegatives(model, dataset.text_features, ids, config.bank_refresh_steps)


NEGATIVES: dict[str, Callable[[Config, CLIPModel, ImageTextDataset], BatchNegatives]] = {
    "batch": lambda config, model, dataset: BatchNegatives(),
    "queue": lambda config, model, dataset: QueueNegatives(config.queue_size),
    "bank": _bank,
}


def build_negatives(config: Config, model: CLIPModel, dataset: ImageTextDataset) -> BatchNegatives:
    """What `config.negatives` names. Raises: LabError for a bank without cached captions."""
    return choose(NEGATIVES, config.negatives, "negatives")(config, model, dataset)
