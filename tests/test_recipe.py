"""Recipes: what is read is what was written, what is wrong is refused with the way out."""

from pathlib import Path

import pytest
import yaml

from fastdistil.errors import UserError
from fastdistil.recipe import Recipe, all_keys, load_recipe, named_recipes, validated


@pytest.mark.parametrize("name", named_recipes())
def test_named_recipes_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe
    assert yaml.safe_load(recipe.to_yaml())["version"] == 1


def test_distilbert_is_the_published_recipe() -> None:
    """Sanh et al. 2019 and the README command of the Hugging Face example."""
    recipe = load_recipe("distilbert")
    objective, optim = recipe.objective, recipe.optim
    assert (objective.a_ce, objective.a_mlm, objective.a_cos, objective.temperature) == (5, 2, 1, 2)
    assert (optim.lr, optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (5e-4, 0.9, 0.98, 1e-6, 0)
    assert (optim.warmup, optim.clip, recipe.loop.accumulation, recipe.loop.epochs) == (0.05, 5, 50, 3)
    assert recipe.student.layers == (0, 2, 4, 7, 9, 11)
    assert (recipe.mask.probability, recipe.mask.mask, recipe.mask.keep, recipe.mask.random) == (0.15, 0.8, 0.1, 0.1)
    assert recipe.mask.smoothing == 0.7


def test_overrides_reach_every_level() -> None:
    recipe = load_recipe("distilbert", ["optim.lr=1e-4", "seed=7", "data.heldout=x", "teacher.path=t", "loop.updates=3"])
    assert recipe.optim.lr == 1e-4
    assert (recipe.seed, recipe.data.heldout) == (7, "x")
    assert recipe.teacher is not None and recipe.teacher.path == "t"
    assert (recipe.loop.updates, recipe.loop.epochs) == (3, None)  # one of two ways to say it replaces the other
    recipe = load_recipe(
        "distilbert", ["student.config.model_type=bert", "student.config.num_hidden_layers=2", "student.architecture=same"]
    )
    assert recipe.student.config == {"model_type": "bert", "num_hidden_layers": 2}
    assert recipe.student.layers is None


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lrr=1", "optim.lr'"),
        ("lr=1e-4", "optim.lr'"),
        ("optim.warmpu=1", "optim.warmup"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.lr=true", "lr"),
        ("optim.lr=-1", "greater than 0, got -1"),
        ("optim.lr=.inf", "finite"),
        ("loop.accumulation=0", "greater than 0"),
        ("loop.accumulation=1.5", "integer"),
        ("mask.probability=1.5", "less than 1"),
        ("mask.keep=0.5", "must be 1"),
        ("data.layout=heap", "packed"),
        ("seed=-1", "greater than or equal to 0"),
        ("student.every=2", None),
        ("objective.a_clm=1", "set one of them to 0"),
        ("name=../evil", "letters, digits"),
        ("loop", "key=value"),
        ("=3", "key=value"),
        ("optim.lr=[", "YAML"),
        ("teacher=null", "teacher"),
        ("version=2", "version"),
    ],
)
def test_wrong_overrides_are_refused_with_the_way_out(override: str, says: str | None) -> None:
    if says is None:
        assert load_recipe("distilbert", [override]).student.every == 2
        return
    with pytest.raises(UserError) as caught:
        load_recipe("distilbert", [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("version: 2\n", "version 2"),
        ("- a\n", "a list"),
        ("student: [\n", "not valid YAML"),
        ("student: {every: 2}\nloop: {epochs: 1}\nlearning_rate: 3\n", "learning_rate"),
        ("loop: {epochs: 1}\n", "student is missing"),
        ("student: {every: 2}\nteacher: {path: x}\nloop: {epochs: 1, updates: 2}\n", "exactly one"),
        ("student: {path: x, every: 2}\nteacher: {path: x}\nloop: {epochs: 1}\n", "exactly one"),
        ("student: {path: x, architecture: distilbert}\nloop: {epochs: 1}\n", "architecture"),
        ("student: {path: x}\nloop: {epochs: 1}\nobjective: {a_ce: 0, a_mlm: 0, a_cos: 0}\n", "nothing would be learnt"),
    ],
)
def test_bad_recipe_files(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.yaml") as caught:
        load_recipe(str(path))
    assert says in str(caught.value)


def test_unknown_and_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean distilbert"):
        load_recipe("distillbert")
    with pytest.raises(UserError, match="no recipe"):
        load_recipe(str(tmp_path / "absent.yaml"))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: fa\xe7ade\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(str(latin))


def test_a_recipe_is_frozen_and_changed_copies_are_checked() -> None:
    recipe = load_recipe("demo")
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    assert recipe.with_(optim={"lr": 1.0}).optim.lr == 1.0
    with pytest.raises(UserError, match="greater than 0"):
        recipe.with_(optim={"lr": 0.0})
    with pytest.raises(UserError, match="teacher"):
        validated({**recipe.model_dump(), "teacher": None}, "here")


def test_all_keys_name_every_field_once() -> None:
    keys = all_keys()
    assert len(keys) == len(set(keys))
    assert {"optim.lr", "teacher.path", "student.config", "loop.accumulation", "data.train"} <= set(keys)
    assert set(Recipe.model_fields) <= set(keys)


def test_recipes_of_runs_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Every run's recipe.yaml has every key of its version; one that was never set is gone since."""
    path = tmp_path / "recipe.yaml"
    earlier = load_recipe("distilbert").to_yaml().replace("compression:\n", "compression:\n  frozen_variance_after: null\n")
    assert "frozen_variance_after" in earlier
    path.write_text(earlier)
    assert load_recipe(str(path)) == load_recipe("distilbert")
    path.write_text(earlier.replace("after: null", "after: 5"))
    with pytest.raises(UserError, match=r"compression\.frozen_variance_after"):
        load_recipe(str(path))
