"""Recipes: what is read, what is refused, and that every key explains itself."""

from __future__ import annotations

from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from mtp_ce.training.config.recipe import flatten, load_recipe, shipped_recipes, to_yaml
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.errors import RecipeError


def groups(model: type[BaseModel]):
    """The model and every model below it."""
    yield model
    for field in model.model_fields.values():
        inside = [field.annotation]
        while inside:
            part = inside.pop()
            inside += get_args(part)
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from groups(part)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert shipped_recipes()[name].read_text().startswith("# "), "--help shows the first line"


def test_every_key_has_a_description():
    for model in groups(Recipe):
        for key, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{key}"


def test_a_later_override_wins():
    assert load_recipe("tiny", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(("written", "value"), [("3e-4", 3e-4), ("1E+0", 1.0), (".5e-1", 0.05), ("1", 1.0)])
def test_a_number_may_be_written_as_people_write_it(written, value):
    assert load_recipe("tiny", [f"optimizer.lr={written}"]).optimizer.lr == value


def test_an_override_may_carry_a_whole_group():
    recipe = load_recipe("tiny", ["model.mtp={horizon: 2}"])
    assert recipe.model.mtp.horizon == 2


def test_a_duplicate_key_inside_an_override_is_refused():
    with pytest.raises(RecipeError, match="'horizon' is given twice"):
        load_recipe("tiny", ["model.mtp={horizon: 2, horizon: 3}"])


def test_null_is_null_only_where_it_means_something():
    assert load_recipe("tiny", ["validation.every=null"]).validation.every is None
    with pytest.raises(RecipeError, match=r"'train\.steps' is null"):
        load_recipe("tiny", ["train.steps=null"])


def test_a_token_budget_becomes_steps(tmp_path):
    """Rows of 128 tokens, 4 to a batch: 512 tokens a step, and the last one goes beyond the budget."""
    budget = ["train.steps=null", "train.max_tokens=20481", "train.batch_size=4", "data.sequence_length=128"]
    recipe = load_recipe("tiny", budget)
    assert recipe.train.steps == 41
    (tmp_path / "copy.yaml").write_text(to_yaml(recipe))
    assert load_recipe(str(tmp_path / "copy.yaml")) == recipe, "what is printed is the same run"
    short = load_recipe(
        str(tmp_path / "copy.yaml"), ["train.steps=null", "train.batch_size=8", "optimizer.warmup_steps=1"]
    )
    assert short.train.steps == 21


def test_the_budget_of_a_reference_is_its_own():
    recipe = load_recipe("rho1", ["reference.train.steps=null", "reference.train.max_tokens=1000000"])
    tokens = recipe.reference.train.batch_size * recipe.data.sequence_length
    assert (recipe.reference.train.steps - 1) * tokens < 1_000_000 <= recipe.reference.train.steps * tokens
    assert recipe.train == load_recipe("rho1").train


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.max_tokens=1000000"], r"train\.max_tokens 1000000 is \d+ steps of .* give one of them"),
        (["train.steps=null"], r"'train\.steps' is null"),
        (["train.steps=null", "train.max_tokens=0"], r"train\.max_tokens|train\.steps"),
        (["train.steps=null", "train.max_tokens=600"], r"warmup_steps 30 is not below train\.steps 2"),
        (["critic={train: {batch_size: 4, steps: 50, max_tokens: 5}}"], "a critic is trained on pairs"),
        (["data.prompt_field=p"], "prompt_field is given without completion_field"),
        (
            ["precompute_weights=true", "scorer.current=x", "scorer.scope=sequence", "data.packing=padded"],
            "don't hold every token",
        ),
        (["scorer.name=draft_rejection", "precompute_weights=true"], "draft_rejection needs the losses or drafts"),
        (["scorer.name=draft_rejection", "model.mtp.kind=teacher_forcing"], "needs heads that draft.*teacher_forcing"),
        (["scorer={name: shuffled, of: {name: draft_rejection}}", "model.mtp.horizon=1"], "draft.* with horizon 1"),
        (["data.noise.copies=3"], r"copies is 3, but kind documents copies nothing; give data\.noise\.copies=null"),
        (["data.noise={kind: duplicates, share: 0.6, copies: 2}"], "0.6 of repeated tokens needs more than 2 copies"),
        (["data.noise={share: 1.0}"], r"data\.noise\.share.*less than 1"),
        (["data.noise={}", "data.messages_field=m"], "noise is given with messages_field"),
        (["scorer.name=planted_truth"], r"planted_truth reads which tokens are planted noise.*data\.noise is null"),
        (["model.mtp.targets=trunk"], "targets trunk with trunk joint would train the trunk on its own output"),
    ],
)
def test_keys_of_the_data_that_contradict_each_other_are_refused(overrides, words):
    with pytest.raises(RecipeError, match=words) as raised:
        load_recipe("rho1" if "scorer.current=x" in overrides else "tiny", overrides)
    assert "\n" not in str(raised.value)


def test_several_mistakes_give_one_line_that_counts_them():
    with pytest.raises(RecipeError, match=r"\(and 1 more\)") as raised:
        load_recipe("tiny", ["train.steps=0", "train.batch_size=0"])
    assert "\n" not in str(raised.value)


def test_a_recipe_in_a_strange_encoding_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(RecipeError, match="can't be read"):
        load_recipe(str(tmp_path / "latin.yaml"))


def test_a_recipe_survives_being_written_and_read(tmp_path):
    scorer = "scorer={name: shuffled, of: {name: rho1_excess, w_max: 4.0}}"
    recipe = load_recipe(
        "rho1", ["optimizer.lr=1.7e-5", "train.micro_batch_size=1", "optimizer.clip_norm=null", scorer]
    )
    (tmp_path / "copy.yaml").write_text(to_yaml(recipe))
    assert load_recipe(str(tmp_path / "copy.yaml")) == recipe


def test_flatten_names_every_leaf_by_its_dotted_key():
    recipe = load_recipe("tiny")
    flat = flatten(recipe)
    assert flat["model.mtp.horizon"] == 4
    assert not any(isinstance(value, dict) for value in flat.values())
    rebuilt: dict = {}
    for dotted, value in flat.items():
        *path, leaf = dotted.split(".")
        group = rebuilt
        for key in path:
            group = group.setdefault(key, {})
        group[leaf] = value
    whole = yaml.safe_load(to_yaml(recipe))
    assert whole["tracking"].pop("options") == {}, "an empty group has no leaves"
    assert rebuilt == whole


def test_drafts_are_as_long_as_the_heads_unless_one_module_serves_all():
    drafts = "validation.decoding.draft_tokens=3"
    with pytest.raises(RecipeError, match=r"draft_tokens 3 is more than the 2 extra heads of model\.mtp\.horizon 3"):
        load_recipe("tiny", ["model.mtp.horizon=3", drafts])
    assert load_recipe("tiny", ["model.mtp.horizon=4", drafts])
    sequential = ["model.mtp.kind=sequential", drafts]
    assert load_recipe("tiny", ["model.mtp.horizon=3", "model.mtp.shared=true", *sequential])
    assert load_recipe("tiny", ["model.mtp.horizon=2", *sequential]).validation.decoding.draft_tokens == 3
