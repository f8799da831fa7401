"""What a batch is contrasted with beside itself: recent features, or every training caption."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from config import Config
from distributed import gather_rows
from errors import LabError, choose
from models import CLIPModel
from optimisation import EMA

Features = dict[str, Tensor]
CAPTIONS_AT_ONCE = 8192


class BatchNegatives:
    """The batch alone. The base of the others."""

    def before_step(self, batch: dict[str, Any]) -> None:
        """Look at this process's batch before the model does."""

    def extended(self, features: Features, image_id: Tensor, text_id: Tensor) -> Features:
        """The loss's arguments: features and ids, with further rows."""
        return {**features, "image_id": image_id, "text_id": text_id}

    def after_step(self) -> None:
        """Take note of a step."""

    def log(self) -> dict[str, float]:
        """Figures for the history."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class QueueNegatives(BatchNegatives):
    """Keys of this and of recent batches, of images and of captions; older ones of an image in the batch stand aside.

    Keys are features by a running average of the model, without dropout. The batch's own keys count as matches
    beside its features: were all that is old a negative, moving away from it would lower the loss.

    Args:
        size: rows of either kind that are kept.
        decay: of the average.
    Source: MoCo, He et al. 2020, algorithm 1.
    """

    def __init__(self, model: CLIPModel, size: int, decay: float = 0.9) -> None:
        self.model, self.size = model, size
        self.average = EMA(model, decay)
        self.keys: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}

    def extended(self, features: Features, image_id: Tensor, text_id: Tensor) -> Features:
        given = super().extended(features, image_id, text_id)
        for kind, ids in (("image", image_id), ("text", text_id)):
            old_ids = self.rows.get(f"{kind}_id", ids[:0])
            others = ~torch.isin(old_ids, image_id)
            strangers = torch.full_like(old_ids[others], -1)  # two old rows are no pair to learn from
            fresh, keys = given[f"{kind}_features"], self.keys[f"{kind}_features"]
            old_rows = self.rows.get(f"{kind}_features", keys[:0])[others]
            given[f"{kind}_features"] = torch.cat([fresh, keys, old_rows])
            given[f"{kind}_id"] = torch.cat([ids, ids, strangers])
        return given

    @torch.no_grad()
    def before_step(self, batch: dict[str, Any]) -> None:
        with self.average.applied(self.model), in_eval_mode(self.model):
            features = self.model(batch["image"], batch["text"])
        mine = {name: features[name] for name in ("image_features", "text_features")}
        mine |= {name: batch[name] for name in ("image_id", "text_id")}
        self.keys = {name: gather_rows(rows) for name, rows in mine.items()}

    def after_step(self) -> None:
        for name, keys in self.keys.items():
            self.rows[name] = torch.cat([keys, self.rows.get(name, keys[:0])])[: self.size]
        self.average.update(self.model)

    def log(self) -> dict[str, float]:
        return {"queue_rows": float(len(self.rows.get("text_id", ())))}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "average": self.average.average, "step": self.average.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.average.average, self.average.step = state["rows"], state["average"], state["step"]


class BankNegatives(BatchNegatives):
    """Every training caption, encoded from its cached features.

    Where the text head learns, the captions are encoded anew every `refresh_steps` steps, without gradients
    and without dropout; `bank_staleness` in the history is the mean cosine distance that a refresh moved them by.
    The batch's own captions stay in the bank as matches: were only the others old, moving away from all that is
    old would lower the loss.

    Args:
        model: whose text head encodes.
        texts: (N, width) cached features of all training captions.
        text_id: (N,) ids of their images.
    """

    def __init__(self, model: CLIPModel, texts: Tensor, text_id: Tensor, refresh_steps: int) -> None:
        self.model, self.texts, self.refresh_steps = model, texts, refresh_steps
        self.device = model.logit_scale.device
        self.ids = text_id.to(self.device)
        self.learns = any(p.requires_grad for p in model.text_head.parameters())
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

    def extended(self, features: Features, image_id: Tensor, text_id: Tensor) -> Features:
        if self.features is None or (self.learns and self.steps % self.refresh_steps == 0):
            self._encode()
        assert self.features is not None
        return {
            **features,
            "text_features": torch.cat([features["text_features"], self.features]),
            "image_id": image_id,
            "text_id": torch.cat([text_id, self.ids]),
        }

    def after_step(self) -> None:
        self.steps += 1

    def log(self) -> dict[str, float]:
        return {"bank_staleness": self.staleness} if self.learns else {}

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
    """Within, nothing is dropped and BatchNorm's statistics stay."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _bank(config: Config, model: CLIPModel, dataset: Any) -> BatchNegatives:
    if getattr(dataset, "text_features", None) is None:
        raise LabError(
            "negatives 'bank' needs cached captions; set text_tower_mode to 'cached', or negatives to 'queue'."
        )
    ids = torch.from_numpy(getattr(dataset, "table", dataset).caption_image_ids)
    return BankNegatives(model, dataset.text_features, ids, config.bank_refresh_steps)


NEGATIVES: dict[str, Callable[[Config, CLIPModel, Any], BatchNegatives]] = {
    "batch": lambda config, model, dataset: BatchNegatives(),
    "queue": lambda config, model, dataset: QueueNegatives(model, config.queue_size),
    "bank": _bank,
}


def build_negatives(config: Config, model: CLIPModel, dataset: Any) -> BatchNegatives:
    """What `config.negatives` names. Raises: LabError for a bank without cached captions."""
    return choose(NEGATIVES, config.negatives, "negatives")(config, model, dataset)
