"""Text keys take what is written, numbers are decimal, and YAML from anywhere is bounded."""

from __future__ import annotations

import random
import time

import pytest
import yaml

from mtp_ce.training.config.explain import _known_keys
from mtp_ce.training.config.recipe import load_recipe, to_yaml
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.config.words import MAX_CHARACTERS, read_yaml, spelling, value_of
from mtp_ce.training.errors import RecipeError

# What YAML 1.1 makes of them: aliases, comments, truths, octal and sexagesimal numbers, dates, lists, nothing.
TEXTS = [
    "*.jsonl", "my/a #b", "no", "yes", "on", "0100", "1_000", "0x10", "1:30", "2024-01-01", "3e-4", "1.0", "true", "~",
    "[ab]*.txt", "{a,b}.txt", "a: b", "&x", "!x", "@x", "%x", "- x", "it's", '"half', "s3://bucket/a b", " x ",
    "\u00e9",
]  # fmt: skip


def recipe_file(folder, changes: str) -> str:
    """The recipe tiny with some lines of other groups."""
    printed = to_yaml(load_recipe("tiny")).replace("critic: null\n", "")
    (folder / "my.yaml").write_text(printed + changes)
    return str(folder / "my.yaml")


@pytest.mark.parametrize("text", TEXTS)
def test_an_override_of_a_text_key_is_the_text(text, tmp_path):
    """And it is the same text in the recipe that is printed and read again."""
    recipe = load_recipe("tiny", [f"data.corpus={text}", f"data.subset={text}", f"description={text}"])
    assert (recipe.data.corpus, recipe.data.subset, recipe.description) == (text, text, text)
    (tmp_path / "copy.yaml").write_text(to_yaml(recipe))
    assert load_recipe(str(tmp_path / "copy.yaml")) == recipe


def test_quotes_around_all_of_a_text_are_those_of_yaml():
    for written, text in {
        '"*.jsonl"': "*.jsonl", "'null'": "null", '"a\\tb"': "a\tb", "'it''s'": "it's",
        '"a" or "b"': '"a" or "b"', '"': '"', "''": None,
    }.items():  # fmt: skip
        if text is None:
            with pytest.raises(RecipeError, match=r"'data\.subset' is ''; it should have at least 1 character"):
                load_recipe("tiny", [f"data.subset={written}"])
        else:
            assert load_recipe("tiny", [f"data.subset={written}"]).data.subset == text


def test_null_is_no_text_and_a_choice_of_words_is_text():
    assert load_recipe("tiny", ["data.subset=x", "data.subset=null"]).data.subset is None
    with pytest.raises(RecipeError, match=r"'data\.corpus' is null; it should be a valid string"):
        load_recipe("tiny", ["data.corpus=null"])
    assert load_recipe("tiny", ["tracking.kind=none", "train.precision=bf16"]).train.precision == "bf16"


@pytest.mark.parametrize(
    ("written", "way_out"),
    [
        ("0100", "write 100"), ("1_000", "write 1000"), ("0x10", "write 16"), ("0o17", "write 15"), ("0b11", "write 3"),
        ("1:30", "write one number in decimal digits"), ("1,000", "write 1000"), ("+007", "write +7"),
        ("9" * 60, "write a shorter number"), ("9" * 5000, "write a shorter number"), ("yes", "valid integer"),
    ],
)  # fmt: skip
def test_a_number_in_another_notation_is_refused_with_the_one_to_write(written, way_out, tmp_path):
    in_file = recipe_file(tmp_path, f"critic:\n  train:\n    steps: {written}\n    batch_size: 2\n")
    for recipe, overrides, key in (("tiny", [f"train.steps={written}"], "train"), (in_file, [], "critic.train")):
        with pytest.raises(RecipeError, match=rf"'{key}\.steps' is '.*; it should be a valid integer") as raised:
            load_recipe(recipe, overrides)
        assert way_out in str(raised.value)
        assert len(str(raised.value)) < 400
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("written", "way_out"), [("yes", "write true"), ("off", "write false"), ("1", "valid boolean")]
)
def test_a_truth_is_true_or_false(written, way_out):
    with pytest.raises(RecipeError, match=rf"'train\.cpu_offload' is .*{way_out}"):
        load_recipe("tiny", [f"train.cpu_offload={written}"])


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3e-4", 3e-4),
        ("1E+0", 1.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0", 0),
        ("+2", 2),
        ("true", True),
        ("~", None),
        ("", None),
    ],
)
def test_a_word_has_one_meaning(written, value):
    assert value_of(written) == value
    assert type(value_of(written)) is type(value)
    assert spelling(written) is None


@pytest.mark.parametrize("word", ["no", "0100", "1_000", "1:30", "2024-01-01", "1.0", "true"])
def test_an_unquoted_word_of_a_file_is_the_text_of_a_text_key(word, tmp_path):
    """Also inside of a group that an override carries."""
    printed = to_yaml(load_recipe("tiny")).replace("subset: null", f"subset: {word}")
    (tmp_path / "my.yaml").write_text(printed)
    assert load_recipe(str(tmp_path / "my.yaml")).data.subset == word
    assert load_recipe("tiny", [f"data={{subset: '{word}', vocab_size: 300}}"]).data.subset == word


def test_a_word_of_an_option_without_a_type_must_have_one_meaning(tmp_path):
    """YAML 1.1 reads other values there, and so may whoever wrote it."""
    own = "tracking={kind: 'my:Tracker', options: {path: all.csv, port: 8080, deep: {list: [1, a b]}}}"
    assert load_recipe("tiny", [own]).tracking.options == {
        "path": "all.csv",
        "port": 8080,
        "deep": {"list": [1, "a b"]},
    }
    for written, way_out in {"no": "false", "0100": "100", "1_000": "1000"}.items():
        with pytest.raises(
            RecipeError, match=rf"'tracking\.options\.port' is {written}; write {way_out}, or put it in quotes"
        ):
            load_recipe("tiny", [own.replace("8080", written)])
        quoted = load_recipe("tiny", [own.replace("8080", f"'{written}'")])
        assert quoted.tracking.options["port"] == written
        (tmp_path / "copy.yaml").write_text(to_yaml(quoted))
        assert load_recipe(str(tmp_path / "copy.yaml")) == quoted


def test_an_override_without_a_value_is_refused():
    """As an unset variable of a shell script writes it."""
    with pytest.raises(RecipeError, match=r"override 'checkpoint\.every=' has no value; give one, or null"):
        load_recipe("tiny", ["checkpoint.every="])


DEEP = "{a: " * 400 + "1" + "}" * 400
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (DEEP, "nested more than 20 deep"),
        ("[" * 5000, "nested more than 20 deep"),
        ("- " * 5000, "nested more than 20 deep"),
        (LAUGHS, "more than 10,000 values"),
        ("a: &a [*a]", "an alias stands inside of what it stands for"),
        ("corpus: *.jsonl", "put text with special characters in quotes"),
        ("corpus: *jsonl", "put text with special characters in quotes"),
        ("corpus: @x", "put text with special characters in quotes"),
        ("a: !!python/object:os.system {}", "it has the tag"),
        ("a: !!int '0100'", "it has the tag !!int; leave it out"),
        ("? [a, b]\n: c", "a key is a list or a group"),
        (f"{'k' * 300}: 1", "a key has 300 characters"),
        ("<<: 1", "'<<' merges a value that is no group"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: \x01", "special characters are not allowed"),
        ("x" * (MAX_CHARACTERS + 1), "expected at most 100,000"),
        ("a: b: c", "mapping values are not allowed here"),
        ("a: [1", "expected"),
    ],
)  # fmt: skip
def test_yaml_that_is_damaged_or_too_much_is_one_line_at_once(text, words):
    started = time.process_time()
    with pytest.raises(RecipeError) as raised:
        read_yaml(text, "recipe x")
    assert time.process_time() - started < 2
    assert words in str(raised.value)
    assert str(raised.value).startswith("recipe x")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_groups_may_be_written_once_and_merged():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [{x: 5}, *a]}"
    merged = read_yaml(text, "recipe x")
    assert merged == yaml.load(text, yaml.BaseLoader) | {"b": {"x": "1", "y": "3"}, "c": {"x": "5", "y": "2"}}


@pytest.mark.parametrize(
    "overrides", [["optimizer=[1]"], ["scorer=x"], ["model=1"], ["data.corpus.x=1"], ["a" * 300 + "=1"]]
)
def test_what_is_no_group_is_one_line(overrides):
    with pytest.raises(RecipeError) as raised:
        load_recipe("tiny", overrides)
    assert "\n" not in str(raised.value)


# --- choices that overrides change


def test_a_pretrained_model_takes_the_place_of_a_recipes_model():
    """Its sizes and its vocabulary go; the heads stay, and so does what comes from the command line."""
    model = ["model.kind=pretrained", "model.source=runs/first"]
    recipe = load_recipe("tiny", [*model, "model.mtp.horizon=3"])
    assert recipe.model.model_dump(exclude={"mtp"}) == {"kind": "pretrained", "source": "runs/first"}
    assert recipe.model.mtp == load_recipe("tiny", ["model.mtp.horizon=3"]).model.mtp
    assert recipe.data == load_recipe("tiny").data.model_copy(update={"vocab_size": None})
    assert load_recipe("tiny", model[::-1]).model.source == "runs/first", "in any order"
    for given, words in (("model.layers=2", "'model.layers'"), ("data.vocab_size=300", "data.vocab_size is 300")):
        for overrides in ([*model, given], [given, *model]):
            with pytest.raises(RecipeError, match=words):
                load_recipe("tiny", overrides)
    whole = load_recipe("tiny", ["model={kind: pretrained, source: x}"])
    assert (whole.model.source, whole.data.vocab_size) == ("x", None)


def test_a_random_model_takes_the_place_of_a_pretrained_one():
    sizes = ["hidden_size=8", "intermediate_size=8", "layers=1", "attention_heads=2", "kv_heads=1"]
    llama = ["model.kind=llama", "data.vocab_size=300", *(f"model.{size}" for size in sizes)]
    recipe = load_recipe("smollm2", llama)
    assert recipe.model.kind == "llama"
    assert recipe.model.mtp == load_recipe("smollm2").model.mtp


def test_another_scorer_keeps_the_options_that_it_has(tmp_path):
    (tmp_path / "my.yaml").write_text(
        to_yaml(load_recipe("rho1", ["scorer.temperature=0.3", "scorer.current=x"])).replace("critic: null\n", "")
        + "critic: {source: c}\n"
    )
    mine = str(tmp_path / "my.yaml")
    other = load_recipe(mine, ["scorer.name=critic_delta"]).scorer
    assert (other.name, other.temperature) == ("critic_delta", 0.3)
    assert load_recipe(mine, ["scorer.name=uniform"]).scorer == load_recipe("tiny").scorer
    control = load_recipe(mine, ["scorer.name=shuffled", "scorer.of.name=rho1_excess"]).scorer
    assert control.of.temperature == 0.7, "options of the control's own scorer come from nowhere else"
    with pytest.raises(RecipeError, match=r"'scorer\.current' is not one of scorer 'critic_delta'"):
        load_recipe(mine, ["scorer.current=y", "scorer.name=critic_delta"])


def test_a_misspelt_option_of_a_recipe_is_not_dropped_with_its_scorer(tmp_path):
    (tmp_path / "my.yaml").write_text(to_yaml(load_recipe("rho1")).replace("temperature:", "temprature:"))
    with pytest.raises(RecipeError, match=r"scorer\.temprature"):
        load_recipe(str(tmp_path / "my.yaml"), ["scorer.name=uniform"])


# --- a sample of what may come

VALUES = [
    "", "null", "~", "[", "{", "{}", "[]", "[1]", "{a: 1}", "1e999", "-1", "0", "1" * 6000, "yes", "0100", "*a", "&a",
    "!x",
    "'", '"', "\x00", "\ud800", "[[[[[[[[[[[[[[[[[[[[[[[[[", "a: b", "---", "|", "> x", "%", "@", "1:30", str(2**63),
    "x" * 500, "package:x/y", "my:Cls", "{name: uniform}", "{name: shuffled, of: {name: rho1_excess}}", "{<<: 1}",
    "{kind: pretrained, source: x}", "{train: {steps: 1}}", "true", ".nan", "2024-01-01", "\n", "a\nb", "#",
]  # fmt: skip


def test_any_value_of_any_key_is_one_line_or_a_recipe_that_prints_as_itself(tmp_path):
    numbers = random.Random(0)
    keys, valid = sorted({*_known_keys(Recipe)}), 0
    for _ in range(300):
        overrides = [f"{numbers.choice(keys)}={numbers.choice(VALUES)}" for _ in range(numbers.choice([1, 1, 2]))]
        try:
            recipe = load_recipe(numbers.choice(["tiny", "rho1", "smollm2"]), overrides)
        except RecipeError as error:
            said = str(error)
            assert "\n" not in said, overrides
            assert len(said) < 1500, overrides
            continue
        valid += 1
        (tmp_path / "copy.yaml").write_text(to_yaml(recipe))
        assert load_recipe(str(tmp_path / "copy.yaml")) == recipe, overrides
    assert 5 < valid < 200


def test_a_module_of_ones_own_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "fails_when_imported.py").write_text("1 / 0\n")
    with pytest.raises(RecipeError, match=r"fails_when_imported:Own.* can't be loaded: ZeroDivisionError") as raised:
        load_recipe("tiny", ["scorer.name=fails_when_imported:Own"])
    assert "\n" not in str(raised.value)
