import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemerge.errors import InvalidSpec
from ensemerge.merge.methods.table import METHODS, Base, MethodEntry, Parameter
from ensemerge.merge.parameters import Condition
from ensemerge.merge.recipe import (
    Calibration,
    Recipe,
    Slice,
    Source,
    TokenizerOptions,
    TokenOf,
    TokenRule,
    Zero,
    parse_model_yaml,
    parse_recipe,
    parse_recipes,
)
from ensemerge.merge.references import ModelPath, ModelReference
from ensemerge.repository import Spec

TABLE = {
    **METHODS,
    "task": MethodEntry(
        METHODS["linear"].make,
        [
            Parameter("weight", per_model=True),
            Parameter("density", float, 1.0, per_model=True, low=0, high=1),
            Parameter("normalize", bool, False),
            Parameter("steps", int, 3, low=1),
        ],
        Base.ORIGIN,
    ),
}


def parse(**body: Any) -> Recipe:
    return parse_recipe(body, "recipe.yaml", TABLE)


def named(name: str) -> ModelReference:
    return ModelReference(ModelPath(name))


def test_a_whole_recipe() -> None:
    recipe = parse(
        merge_method="task",
        base_model="org/base",
        models=[
            {"model": "org/a@v2+org/lora", "parameters": {"weight": [0, 1], "density": "1e-1"}},
            {"model": {"model": {"path": "a+b"}}, "parameters": {"weight": {"filter": "mlp", "value": 2}}},
        ],
        parameters={"normalize": 1, "weight": [{"filter": "*", "value": 1}]},
        dtype="torch.bfloat16",
        out_dtype="float16",
        tokenizer_source="union",
        chat_template="auto",
        compat="mergekit",
        seed=7,
        tensors="union",
    )
    first, second = recipe.models
    assert first.model == ModelReference(ModelPath("org/a", "v2"), ModelPath("org/lora"))
    assert first.parameters == {"weight": (Condition(None, (0.0, 1.0)),), "density": (Condition(None, 0.1),)}
    assert second == Source(named("a+b"), {"weight": (Condition("mlp", 2.0),)})
    assert recipe.parameters == {"normalize": (Condition(None, True),), "weight": (Condition(None, 1.0),)}
    assert (recipe.dtype, recipe.out_dtype, recipe.seed, recipe.tensors) == ("bfloat16", "float16", 7, "union")
    assert recipe.tokenizer == TokenizerOptions("union")
    assert [str(model) for model in recipe.references()] == ["org/a@v2+org/lora", "a+b", "org/base"]
    assert recipe.donor == named("org/base")


def test_slices() -> None:
    recipe = parse(
        merge_method="slerp",
        slices=[
            {
                "sources": [{"model": "a", "layer_range": [0, 4]}, {"model": "b", "layer_range": [2, 6]}],
                "base_model": "a",
                "residual_weight": 0.5,
                "parameters": {"t": 0.5},
            }
        ],
    )
    sources = (Source(named("a"), {}, (0, 4)), Source(named("b"), {}, (2, 6)))
    assert recipe.slices == (Slice(sources, named("a"), {"t": (Condition(None, 0.5),)}),)
    assert recipe.donor == named("a")


def test_modules() -> None:
    recipe = parse(
        merge_method="linear",
        modules={
            "vision": {"models": ["a", "b"], "parameters": {"weight": 1}},
            "text": {"slices": [{"sources": [{"model": "c", "layer_range": [0, 1]}]}]},
        },
    )
    assert [source.model for source in recipe.modules["vision"].models] == [named("a"), named("b")]
    assert [str(model) for model in recipe.references()] == ["a", "b", "c"]


def test_tokenizer_rules() -> None:
    recipe = parse(
        merge_method="linear",
        models=["a"],
        tokenizer={
            "source": "model:org/t",
            "pad_to_multiple_of": 64,
            "tokens": {
                "<x>": {"source": "a", "force": True},
                "<y>": {"source": {"kind": "zero"}},
                "<z>": {"source": {"kind": "model_token", "model": "a", "token": "hi"}},
            },
        },
    )
    tokens = {"<x>": TokenRule(named("a"), True), "<y>": TokenRule(Zero()), "<z>": TokenRule(TokenOf(named("a"), "hi"))}
    assert recipe.tokenizer == TokenizerOptions(named("org/t"), tokens, 64)


SOURCE = {"model": "a", "layer_range": [0, 2]}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"models": ["a"], "merge_metod": "linear"}, "unknown key 'merge_metod'; did you mean 'merge_method'"),
        ({"merge_method": "liner"}, "did you mean 'linear'"),
        ({}, "'merge_method' is missing"),
        ({"merge_method": "linear"}, "one of 'models', 'slices' and 'modules', got none"),
        ({"models": ["a"], "modules": {"m": {"models": ["a"]}}}, "got models and modules"),
        ({"models": []}, "'models' is empty"),
        ({"models": [{"modle": "a"}]}, "'model' is missing; there is 'modle'"),
        ({"models": "a"}, "'models': expected a list"),
        ({"models": ["a+b+c"]}, r"more than one '\+'"),
        ({"models": ["a@"]}, "expected one '@' and a revision"),
        ({"models": [{"model": "a", "parameters": {"wieght": 1}}]}, "did you mean 'weight'"),
        ({"models": [{"model": "a", "parameters": {"normalize": True}}]}, "one value for all models"),
        ({"models": [{"model": "a", "parameters": {"weight": float("nan")}}]}, "expected a finite number"),
        ({"models": [{"model": "a", "parameters": {"weight": "much"}}]}, "expected a number, got a string 'much'"),
        ({"models": [{"model": "a", "parameters": {"weight": True}}]}, "expected a number, got true or false"),
        ({"models": [{"model": "a", "parameters": {"density": 1.5}}]}, "expected a value from 0 to 1"),
        ({"models": [{"model": "a", "parameters": {"weight": []}}]}, "an empty list"),
        (
            {"models": [{"model": "a", "parameters": {"weight": [1, {"value": 2}]}}]},
            r"'weight'\[0\]: expected a mapping",
        ),
        ({"models": [{"model": "a", "parameters": {"weight": [{"filter": "x"}]}}]}, "'value' is missing"),
        ({"models": [{"model": "a", "parameters": {"weight": [{"filtr": "x", "value": 1}]}}]}, "unknown key 'filtr'"),
        ({"parameters": {"steps": 1.5}}, "expected a whole number"),
        ({"parameters": {"steps": 0}}, "expected at least 1"),
        ({"parameters": {"normalize": 2}}, "expected true or false"),
        ({"parameters": {"normalize": [True, [False]]}}, "expected a number or a switch"),
        ({"slices": [{"sources": []}]}, "'sources' is empty"),
        ({"slices": [{"sources": [{"model": "a"}]}]}, "'layer_range' is missing"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [2, 1]}]}]}, "0 <= start < end"),
        ({"slices": [{"sources": [SOURCE, {"model": "b", "layer_range": [0, 3]}]}]}, "as many layers of every source"),
        ({"modules": {"m": {}}}, "m: expected either 'models' or 'slices'"),
        ({"dtype": "int64"}, "'dtype' is 'int64'; expected one of"),
        ({"compat": "mergkit"}, "did you mean 'mergekit'"),
        ({"tensors": "some"}, "expected one of: all, intersection, union"),
        ({"seed": "x"}, "'seed': expected a whole number"),
        ({"calibration": {}}, "'data' is missing"),
        ({"chat_template": "chatlm"}, "did you mean 'chatml'.*or a template in Jinja"),
        ({"tokenizer_source": "base", "tokenizer": {"source": "base"}}, "expected one of them"),
        ({"tokenizer": {"sorce": "base"}}, "did you mean 'source'"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "expected at least 1"),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "zer"}}}}}, "did you mean 'zero'"),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}}},
            "either 'token' or 'token_id'",
        ),
    ],
)
def test_a_recipe_that_is_not_understood_says_where(body: dict[str, Any], problem: str) -> None:
    whole = {"merge_method": "task", **body} if body and "merge_metod" not in body else body
    if not {"models", "slices", "modules"} & set(whole) and "got none" not in problem:
        whole = {**whole, "models": ["a"]}
    with pytest.raises(InvalidSpec, match=problem):
        parse(**whole)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse(
            merge_method="task",
            models=[{"model": "a", "parameters": {"wight": 1, "density": 2}}, {"modle": "b"}],
            dtype="bf16",
            sed=1,
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert [re.search(r"'(wight|density|model|dtype|sed)'", line) is not None for line in lines] == [True] * 5


def test_without_a_table_parameters_are_read_as_they_are() -> None:
    recipe = parse_recipe({"merge_method": "new", "models": ["a"], "parameters": {"x": [1, 2]}}, "recipe.yaml")
    assert recipe.parameters == {"x": (Condition(None, (1, 2)),)}


# A `kind: merge` model.yaml.


def model_yaml(**body: Any) -> Recipe:
    return parse_model_yaml(Spec("digits-merged", "merge", None, body, "digits-merged/model.yaml"), TABLE)


def test_a_model_yaml_is_linear_with_weights_of_one() -> None:
    recipe = model_yaml(
        models=[{"model": "a"}, {"model": "b:2", "parameters": {"weight": 0.5}}],
        calibration={"data": "calibration.npz", "restore": "batch_norm"},
    )
    assert (recipe.method, recipe.calibration) == ("linear", Calibration("calibration.npz", "batch_norm"))
    assert recipe.models == (Source(named("a")), Source(named("b:2"), {"weight": (Condition(None, 0.5),)}))
    assert recipe.defaults == {"weight": (Condition(None, 1.0),)}
    assert "merge_method" not in recipe.body


def test_a_model_yaml_knows_the_keys_of_its_envelope() -> None:
    with pytest.raises(InvalidSpec, match="unknown key 'tsk'; did you mean 'task'"):
        model_yaml(models=["a"], tsk=1)


# Files.

TWO = """
name: second
merge_method: linear
models: [first, c]
parameters: {weight: 1}
---
merge_method: linear
models: [second, first]
parameters: {weight: 1}
---
name: first
merge_method: linear
models: [a, b]
parameters: {weight: 1}
"""


def test_documents_come_in_the_order_in_which_they_need_each_other() -> None:
    assert [recipe.name for recipe in parse_recipes(TWO, "recipe.yaml", TABLE)] == ["first", "second", None]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("merge_method: [", "cannot be read as YAML"),
        ("merge_method: linear\nmerge_method: slerp\nmodels: [a]", "the key 'merge_method' stands twice"),
        ("merge_method: linear\nmodels: &x [*x]", "an alias leads to itself"),
        ("merge_method: !!python/name:os.system linear\nmodels: [a]", "cannot be read as YAML"),
        ("- a", "expected a mapping of keys to values, got a list"),
        (
            "name: a\nmerge_method: linear\nmodels: [b]\n---\nname: b\nmerge_method: linear\nmodels: [a]",
            "need each other",
        ),
        ("merge_method: linear\nmodels: [b]\n---\nmerge_method: linear\nmodels: [a]", "a different `name`"),
        ("name: ../up\nmerge_method: linear\nmodels: [b]", "'name' is '../up'"),
        ("[" * 5000, "cannot be read as YAML"),
        ("x" * (2 << 20), "expected at most"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(text: str, problem: str) -> None:
    with pytest.raises(InvalidSpec, match=problem):
        parse_recipes(text, "recipe.yaml", TABLE)


def test_aliases_that_unfold_into_millions_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(InvalidSpec, match="unfold into more than"):
        parse_recipes("\n".join(lines), "recipe.yaml", TABLE)


def test_a_plain_alias_is_fine() -> None:
    text = "merge_method: task\nbase_model: z\nparameters: &p {weight: 1}\nmodels: [{model: a, parameters: *p}]"
    (recipe,) = parse_recipes(text, "recipe.yaml", TABLE)
    assert recipe.models[0].parameters == recipe.parameters


# Whatever a person writes.


KEYS = st.sampled_from(
    [
        *("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "tokenizer", "tokens"),
        *(
            "model",
            "sources",
            "layer_range",
            "weight",
            "t",
            "filter",
            "value",
            "source",
            "kind",
            "lora",
            "path",
            "x",
            1,
        ),
    ]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(),
    st.sampled_from(["linear", "slerp", "a", "a+b", "a@r", "*", "union", "zero", "model_token", "float32", ""]),
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=12,
)


@given(ANYTHING)
def test_no_recipe_ends_in_another_error(body: Any) -> None:
    try:
        recipe = parse_recipe(body, "recipe.yaml", TABLE)
    except InvalidSpec:
        return
    assert recipe.references()


@given(st.dictionaries(KEYS, ANYTHING, max_size=4))
def test_no_part_of_a_recipe_ends_in_another_error(part: dict[Any, Any]) -> None:
    body = {"merge_method": "linear", "models": [part, "b"], "parameters": part, "tokenizer": part}
    with pytest.raises(InvalidSpec):
        parse_recipe(body, "recipe.yaml", TABLE)


def test_the_mask_that_changes_nothing_may_stand_at_every_level() -> None:
    mask = {"parameters": {"int8_mask": True}}
    recipe = parse(merge_method="task", models=[{"model": "a", **mask}], **mask)
    assert recipe.models[0].parameters == recipe.parameters == {}
    parse(merge_method="task", slices=[{"sources": [{**SOURCE, **mask}], **mask}])
    with pytest.raises(InvalidSpec, match="'int8_mask': expected true or false"):
        parse(merge_method="task", models=[{"model": "a", "parameters": {"int8_mask": "yes"}}])
