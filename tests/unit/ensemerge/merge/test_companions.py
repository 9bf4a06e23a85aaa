import json
from pathlib import Path
from typing import Any, BinaryIO

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


def test_no_half_file_has_a_final_name(out: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: BinaryIO, target: BinaryIO) -> None:
        target.write(source.read(3))
        raise OSError("no space left")

    with monkeypatch.context() as broken, pytest.raises(OSError, match="no space"):
        broken.setattr("shutil.copyfileobj", full)
        write(out, models, recipe())
    assert list(out.iterdir()) == []
    (out / ".config.json.part").write_text("what a kill left")
    write(out, models, recipe())
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


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


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"dtype": "float32"}, {"dtype": "float16"}),
        ({"torch_dtype": None}, {"torch_dtype": "float16"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, {"dtype": "float16", "torch_dtype": "float16"}),
        ({}, {"torch_dtype": "float16"}),
        ({"vision_config": {"dtype": "float32"}}, {"vision_config": {"dtype": "float16"}}),
    ],
)
def test_the_dtype_stands_where_the_donor_says_it(body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert merged_config(body, Facts("float16"))[0] == expected


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


def sliced(body: dict[str, Any], counts: dict[str, int], **picks: tuple[int, ...]) -> tuple[dict[str, Any], list[str]]:
    """The config after the families whose name holds a key of `picks` were sliced."""
    chosen = {family: found for family in counts for key, found in picks.items() if key in family}
    return merged_config(body, Facts(layers=chosen, donor_layers=counts))


T5, T5_LAYERS = {"num_layers": 4, "num_decoder_layers": 4}, {"encoder.block": 4, "decoder.block": 4}
BART = {"num_hidden_layers": 4, "encoder_layers": 4, "decoder_layers": 4}
BART_LAYERS = {"model.encoder.layers": 4, "model.decoder.layers": 4}


@pytest.mark.parametrize(
    ("body", "counts", "side", "changed"),
    [
        (T5, T5_LAYERS, "decoder", {"num_decoder_layers": 2}),
        (T5, T5_LAYERS, "encoder", {"num_layers": 2}),
        (BART, BART_LAYERS, "decoder", {"decoder_layers": 2}),
        (BART, BART_LAYERS, "encoder", {"encoder_layers": 2, "num_hidden_layers": 2}),
        ({"num_hidden_layers": 4}, {"model.decoder.layers": 4}, "decoder", {"num_hidden_layers": 2}),  # OPT
        ({"num_hidden_layers": 4}, {"bert.encoder.layer": 4}, "encoder", {"num_hidden_layers": 2}),
    ],
)
def test_each_side_of_an_encoder_decoder_has_its_own_count(
    body: dict[str, Any], counts: dict[str, int], side: str, changed: dict[str, Any]
) -> None:
    assert sliced(body, counts, **{side: (0, 3)}) == ({**body, **changed}, [])


def test_both_sides_at_once() -> None:
    updated, notes = sliced(BART, BART_LAYERS, encoder=(0, 1), decoder=(3,))
    assert (updated, notes) == ({"num_hidden_layers": 2, "encoder_layers": 2, "decoder_layers": 1}, [])


def test_every_key_of_one_family_is_set() -> None:
    updated, _ = sliced({"num_hidden_layers": 3, "n_layers": 3}, {"h": 3}, h=(0, 0, 1, 2))
    assert updated == {"num_hidden_layers": 4, "n_layers": 4}


def test_a_part_is_found_by_the_name_of_the_family() -> None:
    body = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 4}}
    counts = {"vision_tower.encoder.layers": 4, "language_model.layers": 4}
    updated, notes = sliced(body, counts, vision=(0, 1))
    assert updated == {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 2}}
    assert notes == []


def test_a_count_that_may_mean_other_layers_is_told() -> None:
    _, notes = sliced({"n_layer": 4}, {"left": 4, "right": 4}, left=(0, 1))
    assert notes == ["config.json: n_layer may mean right as well as left, for which it says 2 now; check it"]
    _, notes = sliced({"num_layers": 4}, T5_LAYERS, encoder=(0, 1))
    assert "num_layers may mean decoder.block as well" in notes[0]
    updated, notes = sliced({"num_layers": 4}, T5_LAYERS, decoder=(0, 1))
    assert updated == {"num_layers": 4} and "no key that says 4 layers (decoder.block)" in notes[0]


def test_lists_follow_the_layers_where_they_speak_of_them() -> None:
    body = {
        "num_hidden_layers": 3,
        "eos_token_id": [1, 2, 0],
        "mlp_layer_types": ["a", "b", "c"],
        "mlp_only_layers": [0, 2],
        "attention_types": [[["global", "local"], 1], [["local"], 1]],
        "mystery": [7, 8, 9],
    }
    updated, notes = sliced(body, {"h": 3}, h=(0, 2, 1, 2))
    assert updated == {
        "num_hidden_layers": 4,
        "eos_token_id": [1, 2, 0],
        "mlp_layer_types": ["a", "c", "b", "c"],
        "mlp_only_layers": [0, 1, 3],
        "attention_types": [[["global", "local", "local", "local"], 1]],
        "mystery": [7, 8, 9],
    }
    assert notes == ["config.json: 'mystery' stays as it is; it may say something of each layer of h"]


# Ids of tokens.


def moved(ids: list[int]) -> Facts:
    return Facts(vocabulary=VocabularyPlan(8, {}, {}, Path(), donor_ids=ids))


def test_ids_of_tokens_follow_the_merged_vocabulary() -> None:
    body = {"eos_token_id": 2, "bos_token_id": [0, 1], "pad_token_id": None, "text_config": {"image_token_id": 1}}
    updated, notes = merged_config({**body, "sep_token_id": -1, "vocab_size": 3}, moved([5, 0, 7]))
    assert updated == {
        "eos_token_id": 7,
        "bos_token_id": [5, 0],
        "pad_token_id": None,
        "text_config": {"image_token_id": 0},
        "sep_token_id": -1,
        "vocab_size": 8,
    }
    assert notes == []


def test_a_token_that_is_gone_is_left_out_and_told(out: Path, models: dict[str, Path]) -> None:
    body = {"eos_token_id": [1, 2], "pad_token_id": 1, "bos_token_id": 9, "bad_words_ids": [[0, 1], [2]]}
    for file in ("config.json", "generation_config.json"):
        (models["org/a"] / file).write_text(json.dumps(body))
    plan = VocabularyPlan(8, {}, {}, models["org/b"], donor_ids=[4, -1, 6])
    notes = write(out, models, recipe(), Facts(vocabulary=plan))
    left = {"eos_token_id": [6], "bad_words_ids": [[6]]}
    assert json.loads((out / "generation_config.json").read_text()) == left
    assert json.loads((out / "config.json").read_text()) == {**left, "vocab_size": 8}
    told = [note.split(" was ")[0] for note in notes]
    assert told == [f"{file}: '{key}'" for file in ("config.json", "generation_config.json") for key in body]


# Tokenizer and chat template.


PLAIN = ["sentencepiece.bpe.model", "spm.model", "tekken.json", "source.spm", "target.spm", "bpe.codes"]


@pytest.mark.parametrize("name", PLAIN)
def test_every_kind_of_tokenizer_is_copied_unless_superseded(out: Path, models: dict[str, Path], name: str) -> None:
    (models["org/a"] / name).write_bytes(b"plain")
    write(out, models, recipe())
    assert (out / name).read_bytes() == b"plain"
    (out.parent / "union").mkdir()
    write(out.parent / "union", models, recipe(), Facts(vocabulary=VocabularyPlan(9, {}, {}, models["org/a"], "{}")))
    assert not (out.parent / "union" / name).exists()


def test_other_templates_of_the_donor_go_along_unless_one_is_chosen(out: Path, models: dict[str, Path]) -> None:
    (models["org/a"] / "chat_template.json").write_text("{}")
    (models["org/a"] / "additional_chat_templates").mkdir()
    (models["org/a"] / "additional_chat_templates" / "tools.jinja").write_text("tools")
    write(out, models, recipe())
    assert (out / "chat_template.json").exists()
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    (out.parent / "chosen").mkdir()
    write(out.parent / "chosen", models, recipe(chat_template="chatml"))
    assert not (out.parent / "chosen" / "chat_template.json").exists()
    assert not (out.parent / "chosen" / "additional_chat_templates").exists()


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


@pytest.fixture
def cached(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The same models, and an adapter, in Hugging Face's cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    found = {}
    for name in ("a", "b", "lora"):
        found[f"org/{name}"] = tmp_path / "hub" / f"models--org--{name}" / "snapshots" / "c0ffee"
        found[f"org/{name}"].parent.mkdir(parents=True)
        if name == "lora":
            found["org/lora"].mkdir()
        else:
            models[f"org/{name}"].rename(found[f"org/{name}"])
    return found


def test_the_card_says_what_was_merged(cached: dict[str, Path]) -> None:
    models = {name: cached[name] for name in ("org/a", "org/b")}
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
    assert "base_model" not in front_matter(model_card(recipe(), TEXT, models))


def test_repositories_have_no_revisions_and_adapters_count(cached: dict[str, Path]) -> None:
    merged = recipe(models=["org/a@v1", "org/b+org/lora@c0ffee", "./local"])
    folders = {"org/a@v1": cached["org/a"], "org/b+org/lora@c0ffee": cached["org/b"], "./local": Path("local")}
    expected = ["org/a", "org/b", "org/lora"]
    assert front_matter(model_card(merged, TEXT, folders))["base_model"] == expected
    beside = model_card(merged, TEXT, folders, adapters={"org/lora@c0ffee": Path("elsewhere")})
    assert front_matter(beside)["base_model"] == ["org/a", "org/b"]


def test_the_card_of_one_task_says_which(out: Path, models: dict[str, Path]) -> None:
    write_companions(out, recipe(), TEXT, models["org/a"], models, Facts(), task="org/b")
    card = (out / "README.md").read_text()
    assert "\n# Merge of a, b: org/b\n" in card
    assert "This is the model for the task of `org/b`." in card
    assert "for the task" not in model_card(recipe(), TEXT, models)
