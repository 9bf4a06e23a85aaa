import json
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import pytest
import yaml

from ensemerge.errors import InvalidModel, InvalidSpec
from ensemerge.merge.chat_templates import CHAT_TEMPLATES
from ensemerge.merge.citations import CITATIONS
from ensemerge.merge.companions import Facts, chosen_template, merged_config, model_card, write_companions
from ensemerge.merge.methods.table import METHODS
from ensemerge.merge.recipe import Recipe, parse_recipe
from ensemerge.merge.vocabulary import VocabularyPlan

TEXT = "merge_method: linear\nmodels: [org/a, org/b]\n"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "layer_types": ["full", "sliding", "full", "sliding"],
    "num_hidden_layers": 4,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": 8,
}


def recipe(**body: Any) -> Recipe:
    return parse_recipe({"merge_method": "linear", "models": ["org/a", "org/b"], **body}, "recipe.yaml")


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Two model folders with everything beside the weights."""
    folders = {}
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "generation_config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("{}")
        (folder / "vocab.json").write_text("{}")
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": f"{{# {name} #}} template"}))
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# card\n")
        folders[f"org/{name}"] = folder
    return folders


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "merged").mkdir()
    return tmp_path / "merged"


def write(out: Path, models: dict[str, Path], wanted: Recipe, facts: Facts | None = None) -> tuple[str, ...]:
    return write_companions(out, wanted, TEXT, models["org/a"], models, facts or Facts())


def config(changes: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return merged_config({**CONFIG, **changes}, facts)[0]


def test_everything_beside_the_weights_is_there(out: Path, models: dict[str, Path]) -> None:
    assert write(out, models, recipe()) == ()
    expected = {"README.md", "config.json", "ensemerge_recipe.yaml", "generation_config.json"}
    assert {path.name for path in out.iterdir()} == expected | {"tokenizer.json", "tokenizer_config.json", "vocab.json"}
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert (out / "ensemerge_recipe.yaml").read_text() == TEXT


def test_mergekits_name_for_the_recipe_where_it_is_followed(out: Path, models: dict[str, Path]) -> None:
    write(out, models, recipe(compat="mergekit"))
    assert (out / "mergekit_config.yml").read_text() == TEXT


def test_nothing_is_overwritten(out: Path, models: dict[str, Path]) -> None:
    (out / "config.json").write_text("mine")
    with pytest.raises(InvalidSpec, match=r"config\.json exists already"):
        write(out, models, recipe())
    assert (out / "config.json").read_text() == "mine"


def test_links_of_the_cache_are_copied_as_files(out: Path, models: dict[str, Path]) -> None:
    tokenizer = models["org/a"] / "tokenizer.json"
    tokenizer.rename(tokenizer.with_name("blob"))
    tokenizer.symlink_to("blob")
    write(out, models, recipe())
    assert not (out / "tokenizer.json").is_symlink()
    assert (out / "tokenizer.json").read_text() == "{}"


def test_a_model_without_companions_still_has_a_card(out: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    assert write(out, {"org/a": tmp_path / "bare"}, recipe()) == ()
    assert {path.name for path in out.iterdir()} == {"README.md", "ensemerge_recipe.yaml"}


def test_a_broken_config_is_told(out: Path, models: dict[str, Path]) -> None:
    (models["org/a"] / "config.json").write_text("{")
    with pytest.raises(InvalidModel, match="cannot be read as JSON"):
        write(out, models, recipe())


# config.json.


def test_the_config_says_what_became_of_the_donor() -> None:
    plan = VocabularyPlan(16, {}, {}, Path())
    facts = Facts("bfloat16", plan, {"model.layers": (0, 1, 1, 2, 3)}, {"model.layers": 4}, untied=True)
    assert config({}, facts) == {
        "architectures": ["LlamaForCausalLM"],
        "layer_types": ["full", "sliding", "sliding", "full", "sliding"],
        "num_hidden_layers": 5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 16,
    }


def test_newer_configs_call_it_dtype() -> None:
    changed = merged_config({"dtype": "float32"}, Facts("float16"))[0]
    assert changed == {"dtype": "float16"}


def test_a_model_of_several_parts_has_its_text_under_a_key_of_its_own() -> None:
    body = {"text_config": {"num_hidden_layers": 4, "vocab_size": 8}, "vision_config": {"num_hidden_layers": 2}}
    facts = Facts(
        None, VocabularyPlan(9, {}, {}, Path()), {"language_model.layers": (0, 1)}, {"language_model.layers": 4}
    )
    changed = merged_config(body, facts)[0]
    assert changed["text_config"] == {"num_hidden_layers": 2, "vocab_size": 9}
    assert changed["vision_config"] == {"num_hidden_layers": 2}


def test_a_layer_count_without_a_key_is_told() -> None:
    _, notes = merged_config({"depth": 4}, Facts(layers={"blocks": (0, 1)}, donor_layers={"blocks": 4}))
    assert notes == ["config.json has no key that says 4 layers (blocks); set it to 2 by hand"]


# Tokenizer and chat template.


def test_a_union_tokenizer_replaces_what_it_supersedes(out: Path, models: dict[str, Path]) -> None:
    plan = VocabularyPlan(9, {}, {}, models["org/b"], '{"union": 1}')
    write(out, models, recipe(), Facts(vocabulary=plan))
    assert (out / "tokenizer.json").read_text() == '{"union": 1}'
    assert "# b #" in (out / "tokenizer_config.json").read_text()
    assert not (out / "vocab.json").exists()


def test_a_chat_template_is_written_twice_as_loaders_look_for_it(out: Path, models: dict[str, Path]) -> None:
    write(out, models, recipe(chat_template="chatml"))
    assert (out / "chat_template.jinja").read_text() == CHAT_TEMPLATES["chatml"]
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == CHAT_TEMPLATES["chatml"]


def test_auto_is_the_commonest_of_the_models_templates(models: dict[str, Path]) -> None:
    (models["org/b"] / "chat_template.jinja").write_text("{# jinja file #}\n")
    third = {**models, "org/c": models["org/b"]}
    assert chosen_template(recipe(chat_template="auto"), third) == "{# jinja file #}"
    assert chosen_template(recipe(chat_template="auto"), {}) is None


def test_a_template_may_be_written_out(models: dict[str, Path]) -> None:
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert chosen_template(recipe(chat_template=text), models) == text


CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
        ),
        ("alpaca", "S\n\n### Instruction:\nU\n\n### Response:\nA\n\n"),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "U<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
        ),
        ("mistral", "<s> [INST] S\n\nU [/INST] A</s>"),
        ("exaone", "[|system|]S[|endofturn|]\n[|user|]U\n[|assistant|]A[|endofturn|]\n"),
    ],
)
def test_chat_formats(name: str, text: str) -> None:
    assert rendered(name, CHAT) == text


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("chatml", "<|im_start|>assistant\n"),
        ("alpaca", "### Response:\n"),
        ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("mistral", "[/INST]"),
        ("exaone", "[|assistant|]"),
    ],
)
def test_a_prompt_leaves_the_turn_to_the_model(name: str, ending: str) -> None:
    assert rendered(name, CHAT[:2], add_generation_prompt=True).endswith(ending)


def rendered(name: str, messages: list[dict[str, str]], **more: Any) -> str:
    """As transformers renders a chat template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(CHAT_TEMPLATES[name])
    return template.render(messages=messages, bos_token="<s>", eos_token="</s>", **more)


# The model card.


def front_matter(card: str) -> dict[str, Any]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_the_card_says_what_was_merged(models: dict[str, Path]) -> None:
    card = model_card(recipe(base_model="org/a"), TEXT, models)
    assert front_matter(card) == {
        "base_model": ["org/a", "org/b"],
        "library_name": "transformers",
        "tags": ["merge", "ensemerge"],
        "license": "apache-2.0",
    }
    for text in (
        "# Merge of a, b",
        "The base model is `org/a`",
        "`linear`",
        "arXiv 2203.05482",
        "- `org/b` (apache-2.0)",
        f"```yaml\n{TEXT}```",
    ):
        assert text in card


def test_a_named_merge_has_its_name_for_a_title(models: dict[str, Path]) -> None:
    assert "\n# mine\n" in model_card(recipe(name="mine"), TEXT, models)


def test_citations_are_of_methods_that_there_are() -> None:
    assert set(CITATIONS) <= set(METHODS)


def test_licences_that_differ_are_left_to_a_person(models: dict[str, Path]) -> None:
    (models["org/b"] / "README.md").write_text("---\nlicense: mit\n---\n")
    card = model_card(recipe(), TEXT, models)
    assert "license" not in front_matter(card)
    assert "- `org/b` (mit)" in card


@pytest.mark.parametrize("text", ["", "no front matter", "---\n: [\n---\n", "---\nlicense: [a, b]\n---\n"])
def test_a_card_that_states_no_licence(models: dict[str, Path], text: str) -> None:
    (models["org/b"] / "README.md").write_text(text)
    assert "license" not in front_matter(model_card(recipe(), TEXT, models))


def test_a_recipe_with_a_fence_of_its_own(models: dict[str, Path]) -> None:
    assert "\n````yaml\n# ```\n````\n" in model_card(recipe(), "# ```\n", models)


def test_local_paths_are_no_repositories(models: dict[str, Path]) -> None:
    card = model_card(recipe(models=["./a", "/data/b"]), TEXT, {})
    assert "base_model" not in front_matter(card)
