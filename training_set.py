"""Captioned pictures as training sees them: balanced, varied, and with mined negatives."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from augment import draw, speaks_of_sides, swap_sides, variation_number, vary
from config import Config
from dataset import Batch, COCOClipDataset
from errors import LabError
from image_cache import ImageCache
from mining import NONE, check_negatives, mine_random, mine_semantic, nearest_images, neighbour_order
from models import CLIPModel
from optimisation import autocast

# --- Balanced epochs ---


def small_categories(categories: np.ndarray, minimum: int) -> dict[str, int]:
    """Categories with fewer images than `minimum`, and how many they have; "" is no category.

    Args: categories: (I,) names.
    """
    names, counts = np.unique(categories, return_counts=True)
    return {
        str(name): int(count)
        for name, count in zip(names, counts, strict=True)
        if count < minimum or not name
    }


class Balance:
    """Draws an epoch's items so that each category brings as many: its quota.

    A larger category brings other items each epoch; a smaller one repeats its own, each as often as any
    other, give or take one.

    Args:
        categories: (N,) the items' categories.
        quota: items a category brings to an epoch; None: the median category's size.
    Raises: LabError if there are fewer than two categories.
    """

    def __init__(self, categories: np.ndarray, quota: int | None = None) -> None:
        names, self.labels, counts = np.unique(categories, return_inverse=True, return_counts=True)
        if len(names) < 2:
            raise LabError(
                f"balancing takes at least two categories, not {len(names)}; set balance_by to 'none' or lower "
                "min_per_category."
            )
        self.quota = int(np.median(counts)) if quota is None else quota
        self.num_categories = len(names)

    def __len__(self) -> int:
        """Items of an epoch."""
        return self.quota * self.num_categories

    def draw(self, epoch: int, seed: int) -> np.ndarray:
        """(len(self),) an epoch's items, in random order."""
        rng = np.random.default_rng((seed, epoch))
        drawn = [self._of(np.flatnonzero(self.labels == k), rng) for k in range(self.num_categories)]
        return rng.permutation(np.concatenate(drawn))

    def _of(self, items: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        rounds = -(-self.quota // len(items))
        return np.concatenate([rng.permutation(items) for _ in range(rounds)])[: self.quota]


# --- The training set ---


OFF: dict[str, Any] = {
    "captions_per_image": None,
    "balance_by": "none",
    "augment_flip": 0.0,
    "augment_word_dropout": 0.0,
    "augment_reorder": 0.0,
    "mining": "none",
    "mining_neighbour_batches": False,
}
"""What only training does, each turned off: a split that is evaluated is opened so."""


class TrainingSet(COCOClipDataset):
    """A COCOClipDataset that training may balance, vary and extend by mined captions; see config.Config.

    Mined captions are further texts of a batch under their own images' ids, so one whose image is in the
    batch too is a match. Where pictures may be flipped, a batch also has `flip` (I,), which of them are.

    Args:
        balance_by: "category" to draw items so that categories come equally often; images of a category
            with fewer than `min_per_category` are left out, and an epoch has at most `max_per_category` of each.
        augment_flip: probability that a picture is flipped; one whose captions name a side is not, unless
            augment_swap_sides exchanges left and right in them.
        augment_word_dropout, augment_reorder, max_caption_variations: of captions as texts.
    Raises: LabError if captions are to be changed but are cached, or categories are missing.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        balance_by: str = "none",
        min_per_category: int = 2,
        max_per_category: int | None = None,
        augment_flip: float = 0.0,
        augment_swap_sides: bool = False,
        augment_word_dropout: float = 0.0,
        augment_reorder: float = 0.0,
        max_caption_variations: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        self.balance: Balance | None = None
        if balance_by != "none":
            self._balance(min_per_category, max_per_category)
        self.word_dropout, self.reorder = augment_word_dropout, augment_reorder
        self.variations = max_caption_variations if augment_word_dropout or augment_reorder else 1
        self.flip = augment_flip if isinstance(self.images, ImageCache) else 0.0
        self.swap_sides = augment_swap_sides and self.flip > 0
        self._check_captions()
        self.upright = np.array([]) if self.swap_sides or not self.flip else self._naming_sides()
        self.mined = np.empty((len(self), 0), dtype=np.int64)  # rows of captions for each item
        self.neighbours = np.empty((len(self), 0), dtype=np.int64)
        self.mined_in: int | None = None  # the epoch
        self.seconds = 0.0

    def _balance(self, minimum: int, maximum: int | None) -> None:
        if self.table.categories is None:
            raise LabError(
                f"balance_by 'category' needs categories, which {self.table.root} does not give; add them or set "
                "balance_by to 'none'."
            )
        categories = self.table.categories[self.rows]
        small = small_categories(categories, minimum)
        for row, name in zip(self.rows.tolist(), categories.tolist(), strict=True):
            if name in small:
                cause = f"category {name!r} has {small[name]} training images, fewer than {minimum}"
                self.left_out[self.table.paths[row]] = cause if name else "no category"
        self.rows = self.rows[~np.isin(categories, list(small))]
        self.balance = Balance(self.table.categories[self.rows], maximum)

    def _check_captions(self) -> None:
        changes = {"augment_word_dropout or augment_reorder": self.word_dropout or self.reorder}
        changes["augment_swap_sides"] = self.swap_sides
        for name, on in changes.items():
            if on and self.text_features is not None:
                raise LabError(
                    f"{name} changes captions, but theirs are cached features; set text_tower_mode to 'frozen' or "
                    "'trainable'."
                )
        if (self.word_dropout or self.reorder) and self.variations < 2:
            raise LabError(
                "augment_word_dropout and augment_reorder make variations of captions; set max_caption_variations "
                "to 2 or more."
            )

    def _naming_sides(self) -> np.ndarray:
        """Ids of the images whose captions name left or right."""
        named = [speaks_of_sides(caption) for caption in self.table.captions]
        return np.unique(self.table.caption_image_ids[named])

    # --- order ---

    @property
    def items_per_epoch(self) -> int:
        return len(self) if self.balance is None else len(self.balance)

    def epoch_order(self, epoch: int, seed: int) -> np.ndarray:
        """(items_per_epoch,) items: balanced and neighbours side by side, where asked for."""
        plain = super().epoch_order(epoch, seed) if self.balance is None else self.balance.draw(epoch, seed)
        return neighbour_order(plain, self.neighbours, epoch, seed) if self.neighbours.size else plain

    # --- batches ---

    def text_rows(self, items: np.ndarray) -> np.ndarray:
        """Captions of some items, then their mined ones that are not among them."""
        own = super().text_rows(items)
        mined = np.setdiff1d(self.mined[items], [*own, NONE])
        return np.concatenate([own, mined])

    def _texts(self, rows: np.ndarray) -> list[str] | Tensor:
        if self.variations == 1 or self.text_features is not None:
            return super()._texts(rows)
        return [self._varied(row) for row in rows.tolist()]

    def _varied(self, row: int) -> str:
        number = variation_number(row, self.variations, seed=self.seed, epoch=self.epoch)
        options = {"word_dropout": self.word_dropout, "reorder": self.reorder}
        return vary(self.table.captions[row], number, row, seed=self.seed, **options)

    def batch(self, items: list[int]) -> Batch:
        batch = super().batch(items)
        if not self.flip:
            return batch
        ids = batch["image_id"].numpy()
        flips = draw(ids, seed=self.seed, epoch=self.epoch)["flip"] < self.flip
        flips &= ~np.isin(ids, self.upright)
        if self.swap_sides:
            mirrored = np.isin(batch["text_id"].numpy(), ids[flips]).tolist()
            texts = zip(batch["text"], mirrored, strict=True)
            batch["text"] = [swap_sides(text) if turned else text for text, turned in texts]
        return {**batch, "flip": torch.from_numpy(flips)}

    # --- mining ---

    def refresh(self, model: CLIPModel, epoch: int, config: Config) -> None:
        """Mine for the coming epochs under the model as it is, every `mining_refresh_epochs`.

        `seconds` says how long it took; 0 in an epoch that uses what was mined before.
        """
        if epoch == self.mined_in or not (config.mining != "none" or config.mining_neighbour_batches):
            return
        self.seconds = 0.0
        if self.mined_in is not None and epoch < self.mined_in + config.mining_refresh_epochs:
            return
        start = time.perf_counter()
        self._mine(model, epoch, config)
        self.mined_in, self.seconds = epoch, time.perf_counter() - start

    def _mine(self, model: CLIPModel, epoch: int, config: Config) -> None:
        image_id = self.table.image_ids[self.rows]
        texts = np.flatnonzero(np.isin(self.table.caption_image_ids, image_id))  # rows of the table
        text_id = self.table.caption_image_ids[texts]
        told = [self.table.captions[row] for row in texts.tolist()]
        about: Any = (image_id, text_id, told, config.num_mined)
        found = np.empty((len(self), 0), dtype=np.int64)
        if config.mining == "random":
            found = mine_random(*about, seed=self.seed, epoch=epoch)
        if config.mining == "semantic" or config.mining_neighbour_batches:
            images = encode_rows(model.encode_image, self._images, self.rows, model, config)
        if config.mining == "semantic":
            captions = encode_rows(model.encode_text, super()._texts, texts, model, config)
            limits: Any = {"margin": config.mining_margin, "seed": self.seed, "epoch": epoch}
            found = mine_semantic(images, captions, *about, **limits)
        if config.mining_neighbour_batches:
            self.neighbours = nearest_images(images)
        self.mined = np.where(found >= 0, texts[found], NONE)

    def mined_captions(self, item: int) -> list[str]:
        """The captions mined for an item, nearest first."""
        return [self.table.captions[row] for row in self.mined[item].tolist() if row != NONE]

    def state_dict(self) -> dict[str, Any]:
        """What was mined, and when, so that a resumed run goes on with it."""
        return {
            "mined": torch.from_numpy(self.mined),
            "neighbours": torch.from_numpy(self.neighbours),
            "mined_in": self.mined_in,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave. Raises: LabError if it is of another number of images."""
        if len(state["mined"]) != len(self):
            raise LabError(
                f"the checkpoint's mined captions are for {len(state['mined'])} images, not {len(self)}; "
                "set resume to 'never'."
            )
        self.mined, self.neighbours = (state[name].cpu().numpy() for name in ("mined", "neighbours"))
        self.mined_in, self.seconds = state["mined_in"], state["seconds"]


@torch.inference_mode()
def encode_rows(
    encode: Callable[[Any], Tensor],
    inputs: Callable[[np.ndarray], Any],
    rows: np.ndarray,
    model: CLIPModel,
    config: Config,
) -> Tensor:
    """(len(rows), D) features under the model in eval mode, on the CPU; the model's mode is put back.

    Args:
        encode: `model.encode_image` or `model.encode_text`.
        inputs: what it takes, of some of the rows.
    """
    training, device = model.training, model.logit_scale.device
    model.eval()
    size = config.micro_batch_size or config.batch_size
    parts = []
    for start in tqdm(range(0, len(rows), size), desc="mining", unit="batch", delay=2, leave=False):
        given = inputs(rows[start : start + size])
        with autocast(config, device):
            parts.append(encode(given.to(device) if isinstance(given, Tensor) else given).float().cpu())
    model.train(training)
    return torch.cat(parts)


def captioned_set(config: Config, splits: tuple[str, ...], **parts: Any) -> COCOClipDataset:
    """The dataset of some splits: a TrainingSet of those trained on, where the configuration asks for one.

    Args: parts: table, images and text_features, as COCOClipDataset takes them.
    Raises: LabError if more negatives are asked for than there are images to bring them.
    """
    parts = {"captions_per_image": config.captions_per_image, "seed": config.seed, **parts}
    if splits != config.train_splits:
        return COCOClipDataset("+".join(splits), **parts)
    wanted = any(config[name] != off for name, off in OFF.items() if name != "captions_per_image")
    taken = inspect.signature(TrainingSet).parameters.keys() & config.keys()
    options = {name: config[name] for name in taken} if wanted else {}
    dataset = (TrainingSet if wanted else COCOClipDataset)("+".join(splits), **{**options, **parts})
    check_negatives(config, len(dataset))
    return dataset
