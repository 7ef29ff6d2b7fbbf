"""Small files in the real formats of CIFAR-10, GPT-2's tokenizer and TinyStories."""

import json
import pickle

import numpy as np

from esper.data.bpe import END_OF_TEXT

ALPHABET = [*range(33, 127), *range(161, 173), *range(174, 256)]

TRAIN = ["The cat sat.\nIt was the end.", "Hi.", "A longer story about the dog, thé café and the sun."]
VALID = ["The bird flew over the house and the tree.", "No.", "The last story is about the sea and the sand."]


def write_cifar10(data_dir, per_file=12, protocol=2):
    """The six batch files of the Python version, `per_file` images each; the first pixel numbers the image."""
    folder = data_dir / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = generator.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        pixels[:, 0] = np.arange(per_file) + i * per_file
        content = {
            b"batch_label": name.encode(),
            b"labels": [int(number) % 10 for number in pixels[:, 0]],
            b"data": pixels,
            b"filenames": [b"image.png"] * per_file,
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
    return folder


def write_tokenizer(folder, merges=(("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "a"), ("h", "e"))):
    """GPT-2's two files with a handful of merges: bytes first, then merges, end-of-text last, as in the original."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = [chr(byte) for byte in ALPHABET] + [chr(256 + i) for i in range(256 - len(ALPHABET))]
    symbols += ["".join(pair) for pair in merges]
    vocabulary = {symbol: code for code, symbol in enumerate([*symbols, END_OF_TEXT])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return vocabulary


def write_stories(data_dir, pattern="TinyStoriesV2-GPT4-{}.txt", repeat=1):
    """Both files of the data set, their few stories `repeat` times over, and the tokenizer beside them."""
    folder = data_dir / "tinystories"
    vocabulary = write_tokenizer(folder)
    for name, stories in (("train", TRAIN), ("valid", VALID)):
        text = "".join(f"{story}\n{END_OF_TEXT}\n" for story in stories * repeat)
        (folder / pattern.format(name)).write_text(text, encoding="utf-8")
    return vocabulary
