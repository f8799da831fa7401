"""CLIP's own byte-pair tokenizer, its vocabulary from an installed package."""

from __future__ import annotations

import functools
import gzip
import html
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compat  # noqa: F401

import ftfy
import transformers

from errors import LabError

VOCABULARY = 49408  # 256 bytes, the same at a word's end, 48,894 merges, start and end
CONTEXT = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary_file() -> Path:
    """CLIP's list of merges. Raises: LabError if the package that brings it is missing."""
    spec = importlib.util.find_spec("open_clip")  # finds it without importing it
    if spec is None or spec.origin is None:
        raise LabError("package open_clip_torch is not installed; run `pip install -r requirements.txt`.")
    return Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"


def byte_characters() -> list[str]:
    """256 printable characters that stand for the bytes, those that are printable first, as themselves.

    Source: openai/gpt-2 encoder.py, `bytes_to_unicode`.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


@functools.lru_cache(maxsize=1 << 18)  # captions come again every epoch
def clean(text: str) -> str:
    """Repaired, unescaped, with single spaces, in lower case, as CLIP's captions were."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class CLIPTokenizer:
    """Called as transformers' tokenizers are; ids equal those of OpenAI's and open_clip's CLIP.

    Padding is the end mark, as transformers' CLIP has it; a causal encoder never reads it.

    Source: Sennrich et al. 2016, algorithm 1; the vocabulary of Radford et al. 2021.
    """

    def __init__(self) -> None:
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
        """Token ids and attention mask of texts, between start and end mark; options as transformers'.

        A mark written out in a caption is text like any other.
        """
        return self.tokenizer([clean(text) for text in texts], split_special_tokens=True, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it for transformers, which repairs no broken characters and unescapes no HTML."""
        self.tokenizer.save_pretrained(str(folder))


@functools.lru_cache(maxsize=1)
def clip_tokenizer() -> CLIPTokenizer:
    """The tokenizer, read once."""
    return CLIPTokenizer()
