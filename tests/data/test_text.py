"""Language loaders on CPython's own texts and on small files in TinyStories' and GPT-2's real formats."""

import json
from itertools import pairwise

import pytest
import torch

from esper.data.bpe import END_OF_TEXT, load_bpe
from esper.data.text import load_pydocs, load_tinystories, pack, read_stories
from formats import ALPHABET, TRAIN, VALID, write_stories, write_tokenizer


@pytest.mark.parametrize(("length", "blocks"), [(6, 1), (11, 2), (12, 3), (15, 3), (16, 3), (17, 4)])
def test_packing_makes_every_token_but_the_first_a_target(length, blocks):
    tokens = torch.arange(length, dtype=torch.int32)
    split = pack(tokens, 5, "train")
    assert split.inputs.shape == (blocks, 5)
    assert torch.equal(split.targets, split.inputs + 1)
    assert torch.equal(split.targets.unique(), tokens[1:])


def test_a_text_shorter_than_a_block_is_refused():
    with pytest.raises(ValueError, match="validation: 5 tokens; one block of block_size 5 needs 6"):
        pack(torch.zeros(5, dtype=torch.int32), 5, "validation")
    with pytest.raises(ValueError, match="block_size: 0"):
        pack(torch.zeros(5, dtype=torch.int32), 0, "train")


def test_pydocs_are_contiguous_regions_of_real_text():
    splits = load_pydocs(64)
    text = {}
    for name in ("train", "validation", "test"):
        split = getattr(splits, name)
        assert torch.equal(split.inputs[:, 1:], split.targets[:, :-1])
        assert split.inputs.shape[1] == 64
        assert split.inputs.min() >= 0
        assert split.inputs.max() < 256
        text[name] = bytes(split.inputs.flatten().tolist())
    assert len(text["train"]) > 200_000
    assert b"assert" in text["train"]
    train_paragraphs, *held_out = (set(text[name].split(b"\n\n")) for name in ("train", "validation", "test"))
    for paragraphs in held_out:
        assert len(paragraphs) > 50
        assert not paragraphs & train_paragraphs
    assert not splits.is_image


def decode(codes, vocabulary):
    """Text of codes, through the inverse of the byte alphabet."""
    alphabet = {chr(byte): byte for byte in ALPHABET}
    others = [byte for byte in range(256) if byte not in ALPHABET]
    alphabet |= {chr(256 + i): byte for i, byte in enumerate(others)}
    symbols = {code: symbol for symbol, code in vocabulary.items()}
    return bytes(alphabet[c] for code in codes for c in symbols[code]).decode("utf-8")


def test_merges_apply_in_rank_order_within_words(tmp_path):
    vocabulary = write_tokenizer(tmp_path)
    encode, end, size = load_bpe(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert encode("the the") == [vocabulary["the"], vocabulary["Ġthe"]]
    assert encode("aaa") == [vocabulary["aa"], vocabulary["a"]]
    assert encode("t he") == [vocabulary["t"], vocabulary["Ġ"], vocabulary["he"]]
    assert end == vocabulary[END_OF_TEXT] == size - 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("it's they've I'd", ["it", "'s", " they", "'ve", " I", "'d"]),
        ("one  two", ["one", " ", " two"]),
        ("end \n\n", ["end", " \n\n"]),
        ("a1²ⅷ b", ["a", "1²ⅷ", " b"]),
        ("snake_case, naïve!", ["snake", "_", "case", ",", " naïve", "!"]),
        ("日本\u3000語\x1c!", ["日本", "\u3000", "語", "\x1c!"]),
    ],
)
def test_words_are_cut_as_gpt2_cuts_them(tmp_path, text, words):
    """Merging every pair inside a word but never across shows the cuts through the public encoder."""
    pieces = [word.encode("utf-8") for word in words]
    symbol = {byte: chr(byte) for byte in ALPHABET}
    symbol |= {byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in ALPHABET)}
    merges: dict[tuple[str, str], None] = {}
    for piece in pieces:
        joined = symbol[piece[0]]
        for byte in piece[1:]:
            merges[(joined, symbol[byte])] = None
            joined += symbol[byte]
    whole = ["".join(symbol[byte] for byte in piece) for piece in pieces]
    across = [(left, right) for left, right in pairwise(whole) if (left, right) not in merges]
    vocabulary = write_tokenizer(tmp_path, (*merges, *across))
    encode, _, _ = load_bpe(tmp_path / "vocab.json", tmp_path / "merges.txt")
    codes = encode(text)
    assert decode(codes, vocabulary) == text
    assert codes == [vocabulary[word] for word in whole]


def test_tokenizer_files_that_do_not_fit_together_are_refused(tmp_path):
    vocabulary = write_tokenizer(tmp_path)
    files = (tmp_path / "vocab.json", tmp_path / "merges.txt")
    del vocabulary["the"]
    files[0].write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(ValueError, match="no code for 'the'"):
        load_bpe(*files)
    write_tokenizer(tmp_path)
    files[1].write_text("#version: 0.2\nt h e\n", encoding="utf-8")
    with pytest.raises(ValueError, match="'t h e' is not a pair"):
        load_bpe(*files)


def stream(split):
    """The token stream behind the blocks of a split (the last block may overlap its predecessor)."""
    return [*split.inputs[0].tolist(), *split.targets.flatten().tolist()[split.inputs.shape[1] - 1 :]]


@pytest.mark.parametrize("pattern", ["TinyStoriesV2-GPT4-{}.txt", "TinyStories-{}.txt"])
def test_tinystories_pack_every_story_with_end_of_text(tmp_path, pattern):
    vocabulary = write_stories(tmp_path, pattern)
    splits = load_tinystories(tmp_path, 8, 300)
    end = vocabulary[END_OF_TEXT]
    encode, _, _ = load_bpe(tmp_path / "tinystories" / "vocab.json", tmp_path / "tinystories" / "merges.txt")
    tokens = [code for story in TRAIN for code in [*encode(story), end]]
    blocks = splits.train.inputs.tolist()
    regular = [tokens[i : i + 8] for i in range(0, len(tokens) - 8, 8)]
    assert blocks[: len(regular)] == regular
    assert splits.train.targets[-1].tolist() == tokens[-8:]
    held_out = [code for story in VALID for code in [*encode(story), end]]
    half = (len(held_out) + 1) // 2
    assert splits.validation.inputs[0].tolist() == held_out[:8]
    assert splits.validation.targets[-1, -1] == held_out[half - 1]
    assert splits.test.inputs[0].tolist() == held_out[half : half + 8]
    assert splits.test.targets[-1, -1] == end


def test_reading_stops_after_the_wanted_blocks(tmp_path):
    write_stories(tmp_path)
    everything = load_tinystories(tmp_path, 4, 300)
    few = load_tinystories(tmp_path, 4, 300, train_blocks=3, evaluation_blocks=2)
    assert [len(split) for split in (few.train, few.validation, few.test)] == [3, 2, 2]
    assert torch.equal(few.train.inputs, everything.train.inputs[:3])


def test_stories_may_share_a_line_with_their_mark_and_end_without_one(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text(f"one{END_OF_TEXT}two\nlines{END_OF_TEXT}\n\n{END_OF_TEXT}three", encoding="utf-8")
    assert list(read_stories(path)) == ["one", "two\nlines", "three"]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("vocab.json", "https://huggingface.co/openai-community/gpt2/resolve/main/vocab.json"),
        ("merges.txt", "https://huggingface.co/openai-community/gpt2/resolve/main/merges.txt"),
        ("TinyStoriesV2-GPT4-train.txt", "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt"),
        ("TinyStoriesV2-GPT4-valid.txt", "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt"),
    ],
)
def test_a_missing_file_is_named_with_the_command_that_fetches_it(tmp_path, name, source):
    write_stories(tmp_path)
    (tmp_path / "tinystories" / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_tinystories(tmp_path, 8, 300)
    assert str(tmp_path / "tinystories" / name) in str(error.value)
    assert f"curl -L --create-dirs -o {tmp_path / 'tinystories' / name}" in str(error.value)
    assert source in str(error.value)


def test_a_vocabulary_larger_than_the_host_is_refused(tmp_path):
    write_stories(tmp_path)
    with pytest.raises(ValueError, match="262 codes, but the host has 261"):
        load_tinystories(tmp_path, 8, 261)
