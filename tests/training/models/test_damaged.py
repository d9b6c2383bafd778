"""Files of models that are damaged, or claim what they do not hold, cost one line and nothing is built."""

from __future__ import annotations

import json
import random
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mtp_ce import MTPHeads, MTPWrapper
from mtp_ce.training.config.recipe import load_recipe
from mtp_ce.training.data.tokenizer import read_tokenizer
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.models.build import build_model
from mtp_ce.training.models.gguf_header import check_header
from mtp_ce.training.models.sources import fetch_source, find_checkpoint, find_sources

DEEP = "[" * 100_000
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its heads and a tokenizer."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    config = LlamaConfig(vocab_size=12, hidden_size=8, intermediate_size=8, **LAYERS)
    MTPWrapper(LlamaForCausalLM(config), 3).save_pretrained(folder)
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2, "<end>": 3}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def recipe_of(folder: Path):
    return load_recipe("tiny", ["model.kind=pretrained", f"model.source={folder}", "model.mtp.horizon=3"])


def load_all(folder: Path) -> None:
    """What a run and an evaluation do with a model: look at it, then read it."""
    recipe = recipe_of(folder)
    find_sources(recipe)
    find_checkpoint(str(folder))
    read_tokenizer(folder, "model.source", str(folder), 12)
    build_model(recipe, 3, folder)


def refused(folder: Path) -> str:
    """The one line; what still loads was harmless, and is "" then."""
    said, started = "", time.monotonic()
    try:
        load_all(folder)
    except RecipeError as error:
        said = str(error)
    assert time.monotonic() - started < 10
    assert "\n" not in said
    assert len(said) < 800
    return said


def test_a_whole_model_loads(model):
    assert refused(model) == ""


@pytest.mark.parametrize("horizon", [1_000_000, 10**18, 4, 2, 0, -1, True, "3", 3.0, None, [3]])
def test_a_horizon_that_the_tensors_do_not_have_builds_nothing(model, horizon, monkeypatch):
    """In the library too: a million layers would be built before three tensors are looked at."""
    config = {"kind": "residual", "hidden_size": 8, "horizon": horizon}
    (model / "mtp_heads.json").write_text(json.dumps(config))
    monkeypatch.setattr(MTPHeads, "__init__", lambda *_, **__: pytest.fail("heads were built"))
    for load in (MTPHeads.from_pretrained, MTPWrapper.from_pretrained):
        with pytest.raises(ValueError, match=r"mtp_heads\.(json|safetensors)"):
            load(model)
    assert "mtp_heads.json" in refused(model)


@pytest.mark.parametrize("kind", ["layer", "sequential"])
def test_layers_are_counted_before_they_are_built(model, kind, tmp_path):
    wrapper = MTPWrapper(LlamaForCausalLM.from_pretrained(model), 3, heads=kind)
    wrapper.save_pretrained(tmp_path / kind)
    assert MTPWrapper.from_pretrained(tmp_path / kind).horizon == 3
    config = json.loads((tmp_path / kind / "mtp_heads.json").read_text())
    (tmp_path / kind / "mtp_heads.json").write_text(json.dumps({**config, "horizon": 1_000_000}))
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"has 2 extra heads, and mtp_heads\.json beside it has horizon 1000000"):
        MTPWrapper.from_pretrained(tmp_path / kind)
    assert time.monotonic() - started < 5


def test_heads_of_a_class_of_ones_own_have_a_bound_too(model):
    (model / "mtp_heads.json").write_text(json.dumps({"kind": "my.heads:Own", "hidden_size": 8, "horizon": 10**6}))
    with pytest.raises(ValueError, match="has horizon 1000000; expected at most 4096"):
        MTPWrapper.from_pretrained(model)


@pytest.mark.parametrize("hidden_size", [9, 10**12, 0, "8"])
def test_a_width_that_the_tensors_do_not_have_builds_nothing(model, hidden_size):
    (model / "mtp_heads.json").write_text(json.dumps({"kind": "residual", "hidden_size": hidden_size, "horizon": 3}))
    with pytest.raises(ValueError, match="hidden_size"):
        MTPHeads.from_pretrained(model)


def test_tensors_of_other_names_are_named(model):
    save_file({"blocks.0.weight": torch.ones(8, 8), "blocks.1.other": torch.ones(8)}, model / "mtp_heads.safetensors")
    with pytest.raises(ValueError, match=r"mtp_heads\.safetensors has tensors of other names"):
        MTPHeads.from_pretrained(model)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.bias is missing in mtp_heads\.safetensors; expected \[8\] for 3 heads"
    ):
        MTPWrapper.from_pretrained(model)


@pytest.mark.parametrize("layers", [1_000_000, "many", -1, None, 2.5])
def test_a_config_of_more_layers_than_tensors_builds_nothing(model, layers):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    with pytest.raises(RecipeError, match=r"num_hidden_layers .* they are not of one model"):
        find_sources(recipe_of(model))


# What happens to files: cut off, emptied, other types, numbers too large, nested too deep, no text at all.
DAMAGES = {
    "empty": lambda _: b"",
    "half": lambda data: data[: len(data) // 2],
    "no text": lambda _: b"\xff\xfe\x00\x80",
    "null": lambda _: b"null",
    "a list": lambda _: b"[1, 2]",
    "a number": lambda _: b"1e999",
    "digits": lambda _: b"9" * 10_000,
    "deep": lambda _: DEEP.encode(),
    "deep inside": lambda _: b'{"a": ' + DEEP.encode(),
    "an empty object": lambda _: b"{}",
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["config.json", "mtp_heads.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_damaged_file_is_one_line(model, name, damage):
    file = model / name
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    said = refused(model)
    if name in ("config.json", "mtp_heads.json") and damage not in ("a byte order mark", "an empty object"):
        assert name in said


def changed_json(value, numbers: random.Random):
    """The same JSON with one value in it that is another one."""
    odd = [None, True, -1, 0, 10**30, 1e308, "", "x" * 300, [], {}, [[]], {"a": {}}]
    if isinstance(value, dict) and value and numbers.random() < 0.9:
        key = numbers.choice(sorted(value))
        return value | {key: changed_json(value[key], numbers)}
    if isinstance(value, list) and value and numbers.random() < 0.9:
        i = numbers.randrange(len(value))
        return [*value[:i], changed_json(value[i], numbers), *value[i + 1 :]]
    return numbers.choice(odd)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "mtp_heads.json"])
def test_a_value_of_another_type_is_one_line_or_harmless(whole, name, tmp_path):
    numbers = random.Random(name)
    found = []
    for case in range(25):
        model = Path(shutil.copytree(whole, tmp_path / str(case)))
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(changed_json(content, numbers)))
        found.append(refused(model))
    assert any(found)


@pytest.mark.parametrize("name", ["model.safetensors", "mtp_heads.safetensors"])
def test_a_flipped_byte_of_a_header_is_one_line_or_harmless(whole, name, tmp_path):
    numbers = random.Random(name)
    for case in range(15):
        model = Path(shutil.copytree(whole, tmp_path / str(case)))
        data = bytearray((model / name).read_bytes())
        data[numbers.randrange(8 + 200)] ^= 1 << numbers.randrange(8)
        (model / name).write_bytes(data)
        refused(model)


# --- GGUF


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(entries: bytes = b"", count: int = 0, tensors: bytes = b"", tensor_count: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, count) + entries + tensors


def test_a_header_is_walked_to_its_end(tmp_path):
    array = text("b") + struct.pack("<IIQ", 9, 5, 3) + struct.pack("<iii", 1, 2, 3)
    words = text("c") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("yz")
    tensor = text("t") + struct.pack("<IQQIQ", 2, 4, 4, 0, 0)
    whole = gguf(text("a") + struct.pack("<II", 4, 7) + array + words, 3, tensor, 1)
    (tmp_path / "x.gguf").write_bytes(whole)
    check_header(tmp_path / "x.gguf")
    for end in range(len(whole)):
        (tmp_path / "x.gguf").write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"GGUF|version|ends within its header"):
            check_header(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (gguf(text("a") + struct.pack("<IIQ", 9, 0, 1 << 62), 1), "ends within its header"),
        (gguf(text("a") + struct.pack("<IIQ", 9, 8, 1 << 62), 1), "ends within its header"),
        (gguf(text("a") + struct.pack("<I", 77), 1), "unknown type 77"),
        (gguf(text("a") + struct.pack("<IIQ", 9, 9, 1), 1), "unknown type 9"),
        (gguf(count=1 << 63), "ends within its header"),
        (gguf(tensor_count=1 << 63), "ends within its header"),
        (gguf(tensors=text("t") + struct.pack("<I", 1 << 30), tensor_count=1), "1,073,741,824 dimensions"),
        (gguf(version=77), "version 77"),
        (b"", "does not begin with GGUF"),
    ],
)
def test_a_length_that_the_file_does_not_have_is_refused_before_it_is_read(data, words, tmp_path):
    """The package gguf would loop 2^62 times over an array of numbers."""
    (tmp_path / "x.gguf").write_bytes(data)
    started = time.monotonic()
    for read in (
        lambda: fetch_source("model.source", str(tmp_path / "x.gguf")),
        lambda: find_sources(recipe_of(tmp_path / "x.gguf")),
    ):
        with pytest.raises(RecipeError, match=r"model\.source .*x\.gguf' can't be read: .*" + words):
            read()
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("seed", range(6))
def test_what_only_the_reader_of_gguf_finds_is_one_line(tmp_path, seed):
    """Headers that fit the file and mean nothing."""
    numbers = random.Random(seed)
    entries = b"".join(
        text(name) + struct.pack("<IQ", 8, 3) + numbers.randbytes(3) for name in ("general.architecture", "a")
    )
    (tmp_path / "x.gguf").write_bytes(gguf(entries, 2) + numbers.randbytes(64))
    with pytest.raises(RecipeError) as raised:
        fetch_source("model.source", str(tmp_path / "x.gguf"))
    assert "\n" not in str(raised.value)
