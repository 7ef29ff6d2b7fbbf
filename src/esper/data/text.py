"""Language data sets: CPython's own documentation, byte by byte, and TinyStories with GPT-2's tokenizer.

Every block is a window of `block_size + 1` tokens: inputs are its first `block_size`, targets the same shifted by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from esper.data.bpe import END_OF_TEXT, load_bpe
from esper.data.splits import Split, Splits

TINYSTORIES_FOLDER = "tinystories"
_STORIES = ("TinyStoriesV2-GPT4-{}.txt", "TinyStories-{}.txt")
_STORIES_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
_GPT2_URL = "https://huggingface.co/openai-community/gpt2/resolve/main"


def pack(tokens: Tensor, block_size: int, name: str) -> Split:
    """Cut int32 `[L]` into blocks `[M, block_size]` so that every token but the first is a target.

    Blocks overlap in one token, which is a target in one and an input in the next; the last block is moved back to
    end with the text. Raises ValueError, naming the split, when the text is shorter than one block.
    """
    if block_size < 1:
        raise ValueError(f"block_size: {block_size}; it must be at least 1")
    if tokens.shape[0] <= block_size:
        raise ValueError(
            f"{name}: {tokens.shape[0]} tokens; one block of block_size {block_size} needs {block_size + 1}"
        )
    windows = tokens.unfold(0, block_size + 1, block_size)
    if (tokens.shape[0] - 1) % block_size:
        windows = torch.cat([windows, tokens[-block_size - 1 :].unsqueeze(0)])
    return Split(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())


def load_pydocs(block_size: int) -> Splits:
    """The help texts inside CPython (`pydoc_data.topics`) as bytes: a vocabulary of 256, about 370 kB.

    Topics quote each other, so of equal paragraphs only the first stays: none is in two splits. Training, validation
    and test are contiguous regions of the text with 80, 10 and 10 % of it.
    """
    from pydoc_data.topics import topics

    paragraphs = dict.fromkeys(part for name in sorted(topics) for part in topics[name].strip("\n").split("\n\n"))
    text = "\n\n".join(paragraphs).encode("utf-8")
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int32)
    tenth = len(tokens) // 10
    train, validation, test = tokens.split([len(tokens) - 2 * tenth, tenth, tenth])
    return Splits(
        pack(train, block_size, "train"), pack(validation, block_size, "validation"), pack(test, block_size, "test")
    )


def load_tinystories(
    data_dir: Path,
    block_size: int,
    vocabulary_size: int,
    train_blocks: int | None = None,
    evaluation_blocks: int | None = None,
) -> Splits:
    """TinyStories from `data_dir/tinystories`: the training text, and the validation text in two halves.

    Needs `TinyStoriesV2-GPT4-train.txt` and `-valid.txt` (or the same of `TinyStories`) and GPT-2's `vocab.json` and
    `merges.txt`. Stories are joined with end-of-text after each, so short ones are kept and blocks may span several.
    `train_blocks` and `evaluation_blocks` (of validation and of test each) stop reading after that many blocks; None
    reads everything. Raises FileNotFoundError naming the missing path and the command that fetches it, and ValueError
    for a tokenizer that is not GPT-2's or a text shorter than a block.
    """
    folder = data_dir / TINYSTORIES_FOLDER
    vocabulary = _require(folder, ("vocab.json",), _GPT2_URL)
    merges = _require(folder, ("merges.txt",), _GPT2_URL)
    train_file = _require(folder, tuple(name.format("train") for name in _STORIES), _STORIES_URL)
    valid_file = _require(folder, tuple(name.format("valid") for name in _STORIES), _STORIES_URL)
    encode, end, codes = load_bpe(vocabulary, merges)
    if codes > vocabulary_size:
        raise ValueError(f"{vocabulary}: {codes} codes, but the host has {vocabulary_size}; GPT-2's own file is needed")

    def read(path: Path, blocks: int | None, splits: int) -> Tensor:
        limit = None if blocks is None else splits * (blocks * block_size + 1)
        return _token_stream(([*encode(story), end] for story in read_stories(path)), limit)

    validation, test = read(valid_file, evaluation_blocks, 2).tensor_split(2)
    return Splits(
        pack(read(train_file, train_blocks, 1), block_size, "train"),
        pack(validation, block_size, "validation"),
        pack(test, block_size, "test"),
    )


def read_stories(path: Path) -> Iterator[str]:
    """The stories of a text file in which each ends with an end-of-text mark, stripped; empty ones are left out."""
    lines: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            before, *rest = line.split(END_OF_TEXT)
            lines.append(before)
            for part in rest:
                yield from filter(None, ["".join(lines).strip()])
                lines = [part]
    yield from filter(None, ["".join(lines).strip()])


def _token_stream(stories: Iterable[list[int]], limit: int | None) -> Tensor:
    """int32 `[L]`, at most `limit` tokens; stories beyond it are not read."""
    chunks: list[Tensor] = []
    count = 0
    for story in stories:
        chunks.append(torch.tensor(story, dtype=torch.int32))
        count += len(story)
        if limit is not None and count >= limit:
            break
    return torch.cat(chunks)[:limit] if chunks else torch.empty(0, dtype=torch.int32)


def _require(folder: Path, names: tuple[str, ...], url: str) -> Path:
    """The first of `names` that exists in `folder`."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"TinyStories: {' or '.join(str(folder / name) for name in names)} does not exist; fetch it with: "
        f"curl -L --create-dirs -o {folder / names[0]} {url}/{names[0]}"
    )
