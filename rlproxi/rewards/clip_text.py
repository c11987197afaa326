"""Prompts to CLIP's token ids, the same ids as open_clip's tokenizer and as transformers' CLIP tokenizers."""

from __future__ import annotations

import gzip
import html
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .hub import model_folder, reason

#: What every published CLIP reads at most, start and end tokens included.
CONTEXT = 77

_SINGLE_QUOTES, _DOUBLE_QUOTES = "\u02bc\u2018\u2019\u201a\u201b", "\u201c\u201d\u201e\u201f"
_LIGATURES = [0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB05), 0xFB06]
_DROPPED = [*range(0x00, 0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), *range(0xFFF9, 0xFFFD), 0xFEFF]
_PLAIN = {
    **{ord(c): "'" for c in _SINGLE_QUOTES},
    **{ord(c): '"' for c in _DOUBLE_QUOTES},
    **{c: unicodedata.normalize("NFKC", chr(c)) for c in (0x3000, *range(0xFF01, 0xFFF0), *_LIGATURES)},
    0x149: "'n",
    **{c: None for c in _DROPPED},
}


def open_clip_clean(text: str) -> str:
    """open_clip's cleaning: HTML entities, typographic quotes, ligatures and full-width letters made plain, one space
    between words, lower case.

    open_clip leaves the typography to the package ftfy. This covers what prompts hold; ftfy's repair of text that was
    decoded with the wrong encoding ("cafÃ©") is not done here.
    """
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text)).translate(_PLAIN))
    return re.sub(r"\s+", " ", text).strip().lower()


class ClipTokens:
    """Prompts -> ids int64 [B, CONTEXT]: start, words, end, then zeros; a long prompt is cut, its last id is the end.

    Zeros after the end change nothing in the features, whatever the model was trained to be padded with: the text
    tower is causal and is read out at the end token.

    Args:
        encode: prompts -> the ids of each one's words, at most CONTEXT - 2 are looked at.
        start, end: the ids around them. ``end`` is the greatest id of the vocabulary: older models find it by that.
        clean: what is done to a prompt before.
    """

    def __init__(
        self, encode: Callable[[list[str]], list[list[int]]], start: int, end: int, clean: Callable[[str], str] = str
    ):
        self.encode, self.start, self.end, self.clean = encode, start, end, clean

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        ids = torch.zeros(len(prompts), CONTEXT, dtype=torch.long)
        for row, words in zip(ids, self.encode([self.clean(prompt) for prompt in prompts]), strict=True):
            words = [self.start, *words[: CONTEXT - 2], self.end]
            row[: len(words)] = torch.tensor(words)
        return ids


def load_tokens(name: str, clean: Callable[[str], str] = str) -> ClipTokens:
    """A tokenizer from a transformers folder, a hub id, or a file in the format of ``bpe_simple_vocab_16e6.txt.gz``.

    Raises FileNotFoundError where there is none, ValueError for a file in another format.
    """
    if Path(name).is_file():
        return _from_merges(Path(name), clean)
    from transformers import AutoTokenizer

    folder = model_folder(name, "tokenizer", weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers' Rust has an error without a class, and converters raise anything
        raise ValueError(
            f"tokenizer {name!r}: {folder} holds no tokenizer that transformers can load: {reason(error)}"
        ) from None
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if start is None or end is None:
        raise ValueError(f"tokenizer {name!r} has no start or end token (bos {start}, eos {end}): it is not CLIP's")

    def encode(prompts: list[str]) -> list[list[int]]:
        return tokenizer(prompts, add_special_tokens=False, truncation=True, max_length=CONTEXT - 2)["input_ids"]

    return ClipTokens(encode, start, end, clean)


def _from_merges(file: Path, clean: Callable[[str], str]) -> ClipTokens:
    """CLIP's byte-level pair encoding from its list of merges: a heading, then one pair a line, most frequent first.

    The file lists more merges than CLIP uses: its vocabulary of 49,408 is 256 bytes, the same 256 ending a word,
    48,894 merges and two special tokens.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    try:
        opened = gzip.open if file.suffix == ".gz" else open
        with opened(file, "rt", encoding="utf-8") as stream:
            lines = stream.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer {str(file)!r} is no readable list of merges: {error}") from None
    pairs: list[tuple[str, str]] = []
    fault = "" if any(lines) else "it lists no pairs"
    for line in filter(None, lines):
        words = line.split()
        if len(words) != 2:
            fault = f"line {len(pairs) + 2} is {line!r}, not a pair"
            break
        pairs.append((words[0], words[1]))
    if fault:
        raise ValueError(f"tokenizer {str(file)!r} is not in the format of bpe_simple_vocab_16e6.txt.gz: {fault}")
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, pairs)]
    words += ["<start_of_text>", "<end_of_text>"]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs, end_of_word_suffix="</w>"))
    word = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(word, "removed", invert=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    core.add_special_tokens(words[-2:])

    def encode(prompts: list[str]) -> list[list[int]]:
        return [found.ids for found in core.encode_batch(prompts, add_special_tokens=False)]

    return ClipTokens(encode, len(words) - 2, len(words) - 1, clean)


def _byte_letters() -> list[str]:
    """One letter for each byte, in the order of CLIP's vocabulary: the printable bytes stand for themselves, the
    others, in order, for the letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
