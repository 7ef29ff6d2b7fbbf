"""GPT-2's byte-level byte-pair encoding, read from local files (Radford et al. 2019, section 2.2)."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
_CACHED_WORDS = 1 << 18
# Unicode's White_Space property; Python's own \s also takes the separators U+001C to U+001F.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def load_bpe(vocabulary_file: Path, merges_file: Path) -> tuple[Callable[[str], list[int]], int, int]:
    """The encoder, the code of the end-of-text token and the size of the vocabulary.

    Raises ValueError when a file is not in GPT-2's format: no end-of-text token, or bytes and merges that have no code.
    """
    vocabulary: dict[str, int] = json.loads(vocabulary_file.read_text(encoding="utf-8"))
    lines = merges_file.read_text(encoding="utf-8").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"{merges_file}: {' '.join(pair)!r} is not a pair of symbols separated by one space")
    alphabet = _byte_alphabet()
    required = [END_OF_TEXT, *alphabet, *("".join(pair) for pair in pairs)]
    missing = [symbol for symbol in required if symbol not in vocabulary]
    if missing:
        raise ValueError(
            f"{vocabulary_file}: no code for {missing[0]!r} and {len(missing) - 1} more symbols of {merges_file}"
        )
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    words = _word_pattern()

    @lru_cache(maxsize=_CACHED_WORDS)
    def encode_word(word: str) -> tuple[int, ...]:
        symbols = _merge([alphabet[byte] for byte in word.encode("utf-8")], ranks)
        return tuple(vocabulary[symbol] for symbol in symbols)

    def encode(text: str) -> list[int]:
        return [code for word in words.findall(text) for code in encode_word(word)]

    return encode, vocabulary[END_OF_TEXT], max(vocabulary.values()) + 1


def _merge(symbols: list[str], ranks: dict[tuple[str, ...], int]) -> list[str]:
    """Join the best-ranked adjacent pair, everywhere, until no pair has a rank."""
    while len(symbols) > 1:
        best = min(pairwise(symbols), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined: list[str] = []
        for symbol in symbols:
            if joined and joined[-1] == best[0] and symbol == best[1]:
                joined[-1] = "".join(best)
            else:
                joined.append(symbol)
        symbols = joined
    return symbols


@cache
def _byte_alphabet() -> tuple[str, ...]:
    """One printable character per byte: itself where it prints, else the next one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    alphabet, spare = [], 0x100
    for byte in range(256):
        alphabet.append(chr(byte) if byte in printable else chr(spare))
        spare += byte not in printable
    return tuple(alphabet)


@cache
def _word_pattern() -> re.Pattern[str]:
    letter, number = _category("L"), _category("N")
    return re.compile(
        rf"'(?:[stmd]|re|ve|ll)| ?[{letter}]+| ?[{number}]+| ?[^{_SPACE}{letter}{number}]+"
        rf"|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
    )


def _category(initial: str) -> str:
    """Body of a character class with every code point whose Unicode category starts with `initial`."""
    ranges: list[list[int]] = []
    for point in range(sys.maxunicode + 1):
        if unicodedata.category(chr(point))[0] == initial:
            if ranges and ranges[-1][1] == point - 1:
                ranges[-1][1] = point
            else:
                ranges.append([point, point])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)
