import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ensemerge.errors import InvalidModel, InvalidSpec
from ensemerge.merge.recipe import parse_recipe
from ensemerge.merge.vocabulary import (
    ModelVocabulary,
    VocabularyPlan,
    mapped_readers,
    model_vocabulary,
    plan_vocabulary,
    read_tokenizer,
    tokenizers_agree,
)
from ensemerge.weights.reader import WeightReader, read
from ensemerge.weights.safetensors import SafetensorsWeights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS: Mapping[str, tuple[Sequence[str], int, Sequence[str]]] = {  # tokens, rows of the tables, added tokens
    "base": (["<unk>", "x", "y", "z"], 4, []),
    "aa": (["<unk>", "y", "x", "z", "n", "m"], 7, ["<sp>"]),
    "bbb": (["<unk>", "z", "n", "q"], 6, ["<b>"]),
}


def tokenizer(folder: Path, tokens: Sequence[str], added: Sequence[str] = (), kind: str = "WordLevel") -> None:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    listed: Any = [[token, -1.0] for token in tokens] if kind == "Unigram" else vocabulary
    entries = [{"id": len(tokens) + i, "content": token, "special": True} for i, token in enumerate(added)]
    document = {"model": {"type": kind, "vocab": listed}, "added_tokens": entries}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(document))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints whose embedding row i holds 100 k + i in model k, and whose head holds the negative of it."""
    for k, (name, (tokens, rows, added)) in enumerate(TOKENS.items()):
        tokenizer(tmp_path / name, tokens, added)
        table = (100.0 * k + torch.arange(rows)).reshape(rows, 1).repeat(1, 2)
        save_file({EMBEDDING: table, HEAD: -table, "norm.weight": torch.ones(2)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": rows}))
    return tmp_path


def vocabularies(folder: Path) -> dict[str, ModelVocabulary]:
    return {name: model_vocabulary(folder / name, shapes(reader), {}) for name, reader in readers(folder).items()}


def readers(folder: Path) -> dict[str, WeightReader]:
    return {name: SafetensorsWeights(folder / name) for name in TOKENS}


def shapes(reader: WeightReader) -> dict[str, tuple[int, ...]]:
    return {name: reader.info(name).shape for name in reader.names}


def planned(folder: Path, **body: Any) -> VocabularyPlan:
    whole = {"merge_method": "linear", "base_model": "base", "models": ["base", "aa", "bbb"], **body}
    plan = plan_vocabulary(parse_recipe(whole, "recipe.yaml"), vocabularies(folder))
    assert plan is not None
    return plan


def rows(folder: Path, plan: VocabularyPlan, tensor: str = EMBEDDING) -> dict[str, list[float]]:
    found = mapped_readers(plan, readers(folder))
    return {name: read(reader, tensor)[:, 0].tolist() for name, reader in found.items() if tensor in reader.names}


def ids(plan: VocabularyPlan) -> dict[str, int]:
    assert plan.tokenizer_json is not None
    document = json.loads(plan.tokenizer_json)
    return {**document["model"]["vocab"], **{entry["content"]: entry["id"] for entry in document["added_tokens"]}}


def test_a_union_matches_rows_by_token(folder: Path) -> None:
    """Ids and rows as mergekit 0.1.5 gave them: the base's row, else the only owner's, else the owners' mean."""
    plan = planned(folder, tokenizer_source="union")
    tokens = ["<unk>", "x", "y", "z", "n", "m", "q", "<sp>", "<b>"]
    assert ids(plan) == {token: i for i, token in enumerate(tokens)}
    mean_of_n = (104 + 202) / 2
    assert rows(folder, plan) == {
        "base": [0, 1, 2, 3, mean_of_n, 105, 203, 106, 204],
        "aa": [100, 102, 101, 103, 104, 105, 203, 106, 204],
        "bbb": [200, 1, 2, 201, 202, 105, 203, 106, 204],
    }
    assert rows(folder, plan, HEAD)["bbb"] == [-row for row in rows(folder, plan)["bbb"]]
    assert plan.tokenizer_folder == folder / "base"


def test_added_tokens_keep_what_their_tokenizer_says_of_them(folder: Path) -> None:
    document = json.loads(planned(folder, tokenizer_source="union").tokenizer_json or "")
    special = {entry["content"]: entry["special"] for entry in document["added_tokens"]}
    assert special == {"n": False, "m": False, "q": False, "<sp>": True, "<b>": True}


def test_the_base_tokenizer_drops_what_the_base_does_not_know(folder: Path) -> None:
    plan = planned(folder, tokenizer_source="base")
    assert (plan.size, plan.tokenizer_json) == (4, None)
    assert rows(folder, plan) == {"base": [0, 1, 2, 3], "aa": [100, 102, 101, 103], "bbb": [200, 1, 2, 201]}


@pytest.mark.parametrize("source", ["aa", "model:aa"])
def test_a_models_tokenizer(folder: Path, source: str) -> None:
    plan = planned(folder, tokenizer_source=source)
    assert (plan.size, plan.tokenizer_folder) == (7, folder / "aa")
    assert rows(folder, plan)["aa"] == [100, 101, 102, 103, 104, 105, 106]
    assert rows(folder, plan)["base"] == [0, 2, 1, 3, (104 + 202) / 2, 105, 106]


def test_rules_for_single_tokens(folder: Path) -> None:
    rules = {
        "n": {"source": "aa", "force": True},
        "x": {"source": {"kind": "zero"}},
        "z": {"source": {"kind": "zero"}, "force": True},
        "new": {"source": {"kind": "model_token", "model": "bbb", "token": "q"}},
        "other": {"source": {"kind": "model_token", "model": "bbb", "token_id": 1}},
    }
    plan = planned(folder, tokenizer={"source": "base", "tokens": rules})
    assert rows(folder, plan) == {
        "base": [0, 1, 2, 0, 104, 203, 201],
        "aa": [100, 102, 101, 0, 104, 203, 201],
        "bbb": [200, 0, 2, 0, 104, 203, 201],
    }


def test_padding_keeps_its_size_and_its_rows(folder: Path) -> None:
    plan = planned(folder, base_model="bbb", tokenizer_source="base")  # 6 rows, 5 tokens
    assert plan.size == 6
    found = rows(folder, plan)
    assert found["bbb"] == [200, 201, 202, 203, 204, 205]
    assert found["base"][5] == pytest.approx((0 + 3 + 202 + 203 + 204) / 5)
    assert planned(folder, base_model="bbb", tokenizer_source="base", compat="mergekit").size == 5


def test_padding_to_a_multiple_is_the_mean_of_the_tokens(folder: Path) -> None:
    plan = planned(folder, tokenizer={"source": "base", "pad_to_multiple_of": 8})
    assert plan.size == 8
    assert rows(folder, plan)["base"] == [0, 1, 2, 3, 1.5, 1.5, 1.5, 1.5]


def test_a_tied_model_lends_its_embedding_to_a_head(folder: Path) -> None:
    table = torch.arange(6.0).reshape(6, 1).repeat(1, 2)
    save_file({EMBEDDING: table}, folder / "bbb" / "model.safetensors")
    plan = planned(folder, tokenizer_source="union")
    assert rows(folder, plan, HEAD)["base"][6] == 3  # q, the fourth token of bbb alone


def test_a_model_whose_rows_stay_keeps_its_reader(folder: Path) -> None:
    opened = readers(folder)
    mapped = mapped_readers(planned(folder, tokenizer_source="base"), opened)
    assert mapped["base"] is opened["base"]
    assert mapped["aa"] is not opened["aa"]  # fewer rows, though the first stands where it stood


def test_names_that_differ_by_a_prefix_correspond(folder: Path) -> None:
    table = 200 + torch.arange(6.0).reshape(6, 1).repeat(1, 2)
    save_file({"embed_tokens.weight": table, HEAD: -table}, folder / "bbb" / "model.safetensors")
    plan = planned(folder, tokenizer_source="union")
    assert rows(folder, plan)["base"][6] == 203
    assert rows(folder, plan, "embed_tokens.weight")["bbb"][1] == 1


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({"source": "zz"}, "takes its embedding from zz, which is none of the models"),
        ({"source": "bbb"}, "takes its embedding from bbb, which has no token 'x'"),
        ({"source": {"kind": "model_token", "model": "bbb", "token_id": 6}}, "which has no row 6"),
        ({"force": True}, "has 'force' but no 'source'"),
    ],
)
def test_a_rule_that_cannot_be_followed_says_why(folder: Path, rule: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidSpec, match=problem):
        planned(folder, tokenizer={"source": "base", "tokens": {"x": rule}})


def test_without_a_tokenizer_option_sizes_must_agree(folder: Path) -> None:
    recipe = parse_recipe({"merge_method": "linear", "models": ["base", "aa"]}, "recipe.yaml")
    with pytest.raises(InvalidSpec, match="base has 4, aa has 7, bbb has 6; say `tokenizer_source: union`"):
        plan_vocabulary(recipe, vocabularies(folder))
    assert plan_vocabulary(recipe, {"base": vocabularies(folder)["base"]}) is None


def test_tokens_that_moved_are_told(folder: Path) -> None:
    (note,) = tokenizers_agree({name: vocabularies(folder)[name] for name in ("base", "aa")})
    assert note.startswith("aa: 2 tokens have other ids than in base, such as 'x'")
    assert tokenizers_agree({"base": vocabularies(folder)["base"]}) == ()
    (folder / "aa" / "tokenizer.json").write_text("{")
    (note,) = tokenizers_agree({name: vocabularies(folder)[name] for name in ("base", "aa")})
    assert note.startswith("whether aa has the tokens of base is not known")


# Reading.


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel", "Unigram"])
def test_every_kind_of_tokenizer_is_read(tmp_path: Path, kind: str) -> None:
    tokenizer(tmp_path / "t", ["a", "b"], ["<c>"], kind)
    found = read_tokenizer(tmp_path / "t")
    assert (found.ids, found.size) == ({"a": 0, "b": 1, "<c>": 2}, 3)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"model": {}}', '{"model": {"vocab": {"a": "x"}}}', '{"model": {"vocab": {"a": -1}}}', "[" * 9999],
)
def test_a_broken_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InvalidModel, match=r"tokenizer\.json"):
        read_tokenizer(tmp_path)


def test_sentencepiece_alone_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x01")
    with pytest.raises(InvalidModel, match=r"as tokenizer\.model alone.*save it again"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("found", "config", "tensors"),
    [
        ({EMBEDDING: (8, 2), HEAD: (8, 2), "lm_head.bias": (8,)}, {"vocab_size": 8}, (EMBEDDING, HEAD, "lm_head.bias")),
        ({EMBEDDING: (8, 2), "wpe.weight": (8, 2)}, {}, (EMBEDDING,)),
        ({EMBEDDING: (8, 2), HEAD: (3, 2)}, {"vocab_size": 7}, (EMBEDDING,)),
        ({"output.weight": (10, 64), "fc.weight": (64, 64)}, None, ()),
        ({EMBEDDING: (8, 2)}, {"text_config": {"vocab_size": 8}}, (EMBEDDING,)),
    ],
)
def test_vocabulary_tensors_are_found_by_name_and_rows(
    tmp_path: Path, found: dict[str, tuple[int, ...]], config: dict[str, Any] | None, tensors: tuple[str, ...]
) -> None:
    assert model_vocabulary(tmp_path, found, config).tensors == tensors


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("union", None),
        ("base", None),
        ("aa", [0, 2, 1, 3]),
        ("bbb", [0, -1, -1, 1]),
    ],
)
def test_where_the_donors_tokens_went(folder: Path, source: str, expected: list[int] | None) -> None:
    found = planned(folder, tokenizer_source=source).donor_ids
    assert (found if found is None else list(found)) == expected


def test_padding_of_the_donor_keeps_its_number_unless_a_token_takes_it(folder: Path) -> None:
    found = planned(folder, base_model="bbb", tokenizer_source="aa").donor_ids
    # bbb has <unk> z n q <b> and one row of padding, whose number 5 is m's now.
    assert found is not None and list(found) == [0, 3, 4, -1, -1, -1]
    assert planned(folder, base_model="aa", models=["aa", "base"], tokenizer_source="aa").donor_ids is None
