import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemerge.errors import InvalidSpec
from ensemerge.merge.layout import Contribution, Layout, TensorRecipe, expand
from ensemerge.merge.methods.table import METHODS, Base, MethodEntry, Parameter
from ensemerge.merge.naming import ModelNames, layer_counts, layer_of, prefix_map
from ensemerge.merge.recipe import Recipe, parse_recipe

MAKE = METHODS["linear"].make
WEIGHT = Parameter("weight", per_model=True)
# The parameters that mergekit 0.1.5 declares: what is tested is where values come from, not what a method does.
TABLE: dict[str, MethodEntry] = {
    "linear": MethodEntry(MAKE, [WEIGHT, Parameter("normalize", bool, True)]),
    "slerp": MethodEntry(MAKE, [Parameter("t")], Base.FIRST, least=2, most=2),
    "passthrough": MethodEntry(MAKE, [Parameter("scale", float, None, per_model=True)], least=1, most=1),
    "task_arithmetic": MethodEntry(
        MAKE,
        [
            WEIGHT,
            Parameter("density", float, 1.0, per_model=True),
            Parameter("normalize", bool, False),
            Parameter("rescale", bool, False),
            Parameter("int8_mask", bool, False),
            Parameter("lambda", float, 1.0),
        ],
        Base.ORIGIN,
    ),
    "optional": MethodEntry(MAKE, [WEIGHT, Parameter("steps", int, 2)], Base.OPTIONAL_ORIGIN, least=2),
}

LAYER = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
LOOSE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}


def llama(layers: int = 4, *, prefix: str = "model.", without: tuple[str, ...] = ()) -> list[str]:
    names = [f"{prefix}layers.{i}.{rest}" for i in range(layers) for rest in LAYER]
    names += [name.replace("model.", prefix) if name.startswith("model.") else name for name in LOOSE]
    return [name for name in names if name not in without]


def model(layers: int = 4, config: Mapping[str, Any] | None = UNTIED, **changes: Any) -> ModelNames:
    return ModelNames(llama(layers, **changes), {}, config)


def laid_out(body: Mapping[str, Any], **models: ModelNames) -> Layout:
    recipe = parse_recipe(body, "recipe.yaml", TABLE)
    return expand(recipe, models, TABLE)


def by_name(layout: Layout) -> dict[str, TensorRecipe]:
    return {tensor.name: tensor for tensor in layout.tensors}


def problem_of(body: Mapping[str, Any], **models: ModelNames) -> str:
    with pytest.raises(InvalidSpec) as caught:
        laid_out(body, **models)
    return str(caught.value)


LINEAR = {"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": 1}}

# Against mergekit: for each tensor the inputs and every parameter (make_layouts_by_mergekit.py).

MERGEKIT = json.loads(Path(__file__).with_name("layouts_by_mergekit.json").read_text())


@pytest.mark.parametrize("name", MERGEKIT["recipes"])
def test_layouts_are_those_of_mergekit(name: str) -> None:
    recipe = parse_recipe_text(MERGEKIT["recipes"][name])
    models = {key: ModelNames(MERGEKIT["names"], {}, UNTIED) for key in ("a", "b", "base")}
    layout = expand(recipe, models, TABLE)
    expected = MERGEKIT["layouts"][name]
    assert {tensor.name for tensor in layout.tensors} == set(expected)
    for tensor in layout.tensors:
        theirs = expected[tensor.name]
        assert {one.model: one.tensor for one in tensor.inputs} == theirs["tensors"]
        assert {one.model: dict(one.parameters) for one in tensor.inputs} == theirs["parameters"]
        assert dict(tensor.shared) == theirs["shared"]


def parse_recipe_text(text: str) -> Recipe:
    return parse_recipe(yaml.safe_load(text), "recipe.yaml", TABLE)


def test_slerp_begins_with_the_base() -> None:
    layout = laid_out(
        {"merge_method": "slerp", "base_model": "b", "models": ["a", "b"], "parameters": {"t": 0.5}},
        a=model(),
        b=model(),
    )
    assert [one.model for one in layout.tensors[0].contributions] == ["b", "a"]


def test_the_base_of_task_vectors_is_the_origin_named_or_not() -> None:
    body = {"merge_method": "task_arithmetic", "base_model": "z", "models": ["a"], "parameters": {"weight": 1}}
    unnamed = laid_out(body, a=model(), z=model())
    named = laid_out({**body, "models": ["z", "a"]}, a=model(), z=model())
    assert by_name(unnamed) == by_name(named)
    assert unnamed.tensors[0].origin == Contribution("z", unnamed.tensors[0].name, {})


def test_the_donor_of_an_average_is_not_merged_unless_mergekit_is_followed() -> None:
    body = {**LINEAR, "base_model": "z"}
    models = {"a": model(), "b": model(), "z": model()}
    assert [one.model for one in laid_out(body, **models).tensors[0].inputs] == ["a", "b"]
    followed = laid_out({**body, "compat": "mergekit"}, **models)
    assert [one.model for one in followed.tensors[0].inputs] == ["a", "b", "z"]


def test_an_optional_origin_is_left_out_when_there_is_no_base() -> None:
    layout = laid_out({**LINEAR, "merge_method": "optional"}, a=model(), b=model())
    assert layout.tensors[0].origin is None
    based = laid_out({**LINEAR, "merge_method": "optional", "base_model": "z"}, a=model(), b=model(), z=model())
    assert based.tensors[0].origin is not None


def test_a_chosen_layer_knows_where_it_comes_from() -> None:
    body = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 3]}]},
            {"sources": [{"model": "a", "layer_range": [1, 4]}]},
        ],
    }
    layout = laid_out(body, a=model())
    assert layout.layers == {"model.layers": (0, 1, 2, 1, 2, 3)}
    assert len(layout.tensors) == 6 * len(LAYER) + 3
    assert not layout.ties  # a layer used twice is two tensors
    assert by_name(layout)["model.layers.3.mlp.up_proj.weight"].inputs[0].tensor == "model.layers.1.mlp.up_proj.weight"


def test_embeddings_come_from_the_first_slice_and_the_head_from_the_last() -> None:
    body = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "b", "layer_range": [2, 4]}]},
        ],
    }
    layout = laid_out(body, a=model(), b=model())
    tensors = by_name(layout)
    assert [tensors[name].inputs[0].model for name in LOOSE] == ["a", "b", "b"]
    assert any("from the first slice" in note for note in layout.notes)


def test_a_whole_number_must_be_whole_along_its_gradient() -> None:
    body = {**LINEAR, "merge_method": "optional", "parameters": {"weight": 1, "steps": [1, 2]}}
    assert "expected whole numbers along the gradient" in problem_of(body, a=model(), b=model())
    layout = laid_out(body, a=model(2), b=model(2))
    steps = by_name(layout)["model.layers.1.mlp.up_proj.weight"].shared["steps"]
    assert (steps, type(steps)) == (2, int)


# Missing tensors.


def test_tensors_that_a_model_lacks_are_told_all_at_once() -> None:
    lacks = ("model.norm.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)))
    problem = problem_of(LINEAR, a=model(without=lacks), b=model(without=("lm_head.weight",)))
    assert "a lacks 4 of the tensors: " in problem
    assert "… (4 in all)" in problem
    assert "b lacks 1 of the tensors: lm_head.weight" in problem


def test_intersection_leaves_them_out_and_union_takes_them() -> None:
    models = {"a": model(without=("model.norm.weight",)), "b": model()}
    assert "model.norm.weight" not in by_name(laid_out({**LINEAR, "tensors": "intersection"}, **models))
    copied = by_name(laid_out({**LINEAR, "tensors": "union"}, **models))["model.norm.weight"]
    assert (copied.method, copied.contributions) == (
        "passthrough",
        (Contribution("b", "model.norm.weight", {"scale": None}),),
    )


def test_a_union_without_the_base_has_no_task_vectors() -> None:
    body = {"merge_method": "task_arithmetic", "base_model": "z", "models": ["a", "b"], "parameters": {"weight": 1}}
    models = {"a": model(), "b": model(), "z": model(without=("model.norm.weight",))}
    assert "task_arithmetic cannot merge it, z lacks it" in problem_of({**body, "tensors": "union"}, **models)


# Wrong recipes.


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"models": ["a", "a"]}, "a is named twice"),
        ({"parameters": {}}, "linear needs 'weight' of a; it is not set for"),
        ({"merge_method": "slerp"}, "slerp needs 't'; it is not set"),
        ({"merge_method": "slerp", "models": ["a"]}, "needs exactly 2 models, got 1: a"),
        ({"merge_method": "optional", "models": ["a"]}, "needs at least 2 models, got 1: a"),
        ({"merge_method": "passthrough", "parameters": {}}, "needs exactly 1 models, got 2: a, b"),
        ({"merge_method": "task_arithmetic"}, "needs a base; state `base_model`"),
    ],
)
def test_a_recipe_that_cannot_work_says_why(body: dict[str, Any], problem: str) -> None:
    body = {**LINEAR, **body}
    if body["merge_method"] in ("slerp",):
        body["parameters"] = {}
    assert problem in problem_of(body, a=model(), b=model())


def slices(*sources: tuple[str, int, int], **more: Any) -> dict[str, Any]:
    listed = [{"model": name, "layer_range": [start, stop]} for name, start, stop in sources]
    return {"merge_method": "linear", "slices": [{"sources": listed}], "parameters": {"weight": 1}, **more}


def test_a_range_beyond_the_model_is_told() -> None:
    problem = problem_of(slices(("a", 2, 6), ("b", 0, 4)), a=model(), b=model())
    assert "layer_range [2, 6] of a goes beyond its 4 layers (model.layers)" in problem


def test_in_slices_the_base_must_be_a_source() -> None:
    body = slices(("a", 0, 2), merge_method="task_arithmetic", base_model="z")
    assert "expected it once among the sources, got it 0 times" in problem_of(body, a=model(), z=model())


def test_one_model_may_stand_twice_with_other_layers() -> None:
    layout = laid_out(slices(("a", 0, 2), ("a", 2, 4)), a=model())
    inputs = by_name(layout)["model.layers.1.mlp.up_proj.weight"].inputs
    assert [one.tensor for one in inputs] == ["model.layers.1.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"]
    assert "the same layers of one model stand twice" in problem_of(slices(("a", 0, 2), ("a", 0, 2)), a=model())


def test_several_families_of_layers_cannot_be_sliced() -> None:
    names = ["encoder.block.0.w", "encoder.block.1.w", "decoder.block.0.w", "shared.weight"]
    problem = problem_of(slices(("a", 0, 1)), a=ModelNames(names))
    assert "encoder.block (2), decoder.block (1); put each under `modules`" in problem


def test_names_without_numbers_cannot_be_sliced() -> None:
    assert "no numbered layers" in problem_of(slices(("a", 0, 1)), a=ModelNames(["fc.weight"]))


def test_architectures_must_agree_or_be_overridden() -> None:
    config = {"architectures": ["MistralForCausalLM"], **UNTIED}
    models = {"a": model(config={"architectures": ["LlamaForCausalLM"], **UNTIED}), "b": model(config=config)}
    assert "a is LlamaForCausalLM, b is MistralForCausalLM" in problem_of(LINEAR, **models)
    overridden = {"model": "b", "override_architecture": "LlamaForCausalLM"}
    assert laid_out({**LINEAR, "models": ["a", {"model": overridden}]}, **models).tensors


# Modules.


VISION = ["vision_tower.layers.0.w", "vision_tower.layers.1.w", "vision_tower.patch.w"]


def test_modules_are_merged_each_its_own_way() -> None:
    names = [*VISION, *(f"model.language_model.layers.{i}.w" for i in range(3)), "projector.w"]
    body = {
        "merge_method": "linear",
        "parameters": {"weight": 1},
        "modules": {
            "vision_tower": {"models": ["a", "b"], "parameters": {"weight": 2}},
            "language_model": {"slices": [{"sources": [{"model": "b", "layer_range": [1, 3]}]}]},
            "default": {"models": ["a"]},
        },
    }
    layout = laid_out(body, a=ModelNames(names), b=ModelNames(names))
    tensors = by_name(layout)
    assert [one.parameters["weight"] for one in tensors["vision_tower.patch.w"].contributions] == [2.0, 2.0]
    assert tensors["model.language_model.layers.1.w"].contributions[0].tensor == "model.language_model.layers.2.w"
    assert [one.model for one in tensors["projector.w"].contributions] == ["a"]
    assert layout.layers == {"model.language_model.layers": (1, 2)}


def test_tensors_of_no_module_and_modules_of_no_tensor_are_told() -> None:
    body = {"merge_method": "linear", "parameters": {"weight": 1}, "modules": {"vison": {"models": ["a"]}}}
    problem = problem_of(body, a=ModelNames([*VISION, "model.text.0.w"]))
    assert "4 tensors belong to none, such as vision_tower.layers.0.w" in problem
    assert "no tensor begins with 'vison'; the names begin with: vision_tower, model.text" in problem


# Tied embeddings.


HEAD, TABLE_NAME = "lm_head.weight", "model.embed_tokens.weight"


def test_where_all_models_tie_the_output_ties() -> None:
    layout = laid_out(LINEAR, a=model(config=TIED, without=(HEAD,)), b=model(config=TIED))
    assert HEAD not in by_name(layout)
    assert not layout.untied
    assert any("config.json ties it" in note for note in layout.notes)


@pytest.mark.parametrize("silent", [TIED, {}])
def test_where_one_unties_the_embedding_of_the_others_stands_in(silent: dict[str, Any]) -> None:
    layout = laid_out(LINEAR, a=model(config=silent, without=(HEAD,)), b=model())
    assert [one.tensor for one in by_name(layout)[HEAD].contributions] == [TABLE_NAME, HEAD]
    assert layout.untied


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_head_left_out_and_one_that_shares_memory_are_both_tied(order: str) -> None:
    models = {
        "a": model(config=TIED, without=(HEAD,)),  # as safetensors are written
        "b": ModelNames(llama(), {HEAD: TABLE_NAME}, TIED),  # as torch files are
    }
    layout = laid_out({**LINEAR, "models": list(order)}, **models)
    assert layout.ties == {HEAD: TABLE_NAME}
    assert HEAD not in by_name(layout)
    assert not layout.untied
    with_own = laid_out({**LINEAR, "models": ["a", "b", "c"]}, c=model(), **models)
    assert [one.tensor for one in by_name(with_own)[HEAD].contributions] == [TABLE_NAME, HEAD, HEAD]
    assert with_own.untied


def test_a_head_that_the_config_calls_its_own_is_written() -> None:
    shared = ModelNames(llama(), {HEAD: TABLE_NAME}, UNTIED)
    layout = laid_out(LINEAR, a=shared, b=shared)
    assert HEAD in by_name(layout)
    assert not layout.ties


def test_a_head_that_is_not_tied_is_missing() -> None:
    assert f"a lacks 1 of the tensors: {HEAD}" in problem_of(LINEAR, a=model(without=(HEAD,)), b=model())


def test_tensors_that_share_memory_in_all_models_are_merged_once() -> None:
    tied = ModelNames(llama(), {HEAD: TABLE_NAME}, None)
    layout = laid_out(LINEAR, a=tied, b=tied)
    assert layout.ties == {HEAD: TABLE_NAME}
    assert len(layout.tensors) == len(llama()) - 1
    head_first = ModelNames(llama()[::-1], {TABLE_NAME: HEAD}, None)
    assert laid_out(LINEAR, a=head_first, b=head_first).ties == {HEAD: TABLE_NAME}  # loaders look for the embedding
    one_unties = laid_out(LINEAR, a=tied, b=ModelNames(llama()))
    assert not one_unties.ties


# Prefixes.


def test_a_prefix_that_is_all_that_differs_is_seen_through() -> None:
    layout = laid_out(LINEAR, a=model(), b=model(prefix=""))
    tensor = by_name(layout)["model.layers.0.mlp.up_proj.weight"]
    assert [one.tensor for one in tensor.contributions] == [tensor.name, "layers.0.mlp.up_proj.weight"]
    assert any("names differ by a prefix alone" in note for note in layout.notes)


def test_the_first_model_decides_which_prefix_stays() -> None:
    layout = laid_out(LINEAR, a=model(prefix="", config=TIED, without=(HEAD,)), b=model(config=TIED, without=(HEAD,)))
    assert "layers.0.mlp.up_proj.weight" in by_name(layout)


def test_names_that_differ_otherwise_are_not_guessed() -> None:
    assert prefix_map(["a.x.w", "b.y.w"], ["c.x.w", "c.y.w"]) is None
    assert prefix_map(["x.w", "y.w"], ["m.x.w", "m.y.w"]) == {"m.x.w": "x.w", "m.y.w": "y.w"}
    assert prefix_map(["m.x.w", "m.y.w"], ["x.w", "y.w"]) == {"x.w": "m.x.w", "y.w": "m.y.w"}


# Names.


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.7.mlp.experts.3.w1.weight", ("model.layers", 7, "mlp.experts.3.w1.weight")),
        ("h.11.attn.c_attn.weight", ("h", 11, "attn.c_attn.weight")),
        ("0.weight", ("", 0, "weight")),
        ("model.norm.weight", None),
        ("layer1.weight", None),
    ],
)
def test_the_first_number_is_the_layer(name: str, layer: tuple[str, int, str] | None) -> None:
    found = layer_of(name)
    assert (None if found is None else (found.family, found.index, found.rest)) == layer
    assert found is None or found.at(found.index) == name


def test_layers_are_counted_by_family() -> None:
    assert layer_counts(["e.0.w", "e.3.w", "d.1.w", "x"]) == {"e": 4, "d": 2}
