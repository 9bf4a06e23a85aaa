"""Models with different tokenizers: which token each row of the merged embeddings and heads stands for.

Rows are matched by the text of their tokens, never by their numbers. A token that a model lacks gets the base's row,
else the only owner's, else the mean of its owners' rows: the rule of mergekit, so that recipes mean what they meant.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemerge.errors import InvalidModel, InvalidSpec
from ensemerge.merge.naming import config_value, is_embedding, is_head
from ensemerge.merge.problems import Problems, few
from ensemerge.merge.recipe import Recipe, TokenizerOptions, TokenOf, TokenRule, Zero
from ensemerge.merge.references import ModelReference
from ensemerge.weights import prepared
from ensemerge.weights.reader import WeightReader

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

# A mean over so many rows, spread evenly, is as good as over all of a large table, and does not read it whole.
MEAN_ROWS = 1024

Row = tuple[str, int]  # a model, by its text in the recipe, and a row of its table


@dataclass(frozen=True)
class ModelVocabulary:
    """A model's tables: the tensors with a row for each token, how many rows they have, and where its files lie."""

    tensors: tuple[str, ...]
    rows: int
    folder: Path


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json: the id of each token, and the document itself."""

    ids: Mapping[str, int]
    document: Mapping[str, Any]

    @property
    def size(self) -> int:
        """One more than the greatest id."""
        return max(self.ids.values(), default=-1) + 1


@dataclass(frozen=True)
class RowPlan:
    """What the rows of one model's table become, `(size,)`.

    `own[i]` is the model's row that becomes row i, or -1; then `borrowed[i]` are the rows, of any models, whose mean
    it is. A row in neither is zeros.
    """

    own: np.ndarray
    borrowed: Mapping[int, tuple[Row, ...]]
    before: int  # how many rows the table has

    @property
    def is_identity(self) -> bool:
        return len(self.own) == self.before and bool((self.own == np.arange(self.before)).all())


@dataclass(frozen=True)
class VocabularyPlan:
    """The merged vocabulary: rows of the tables, what they are made of, and the tokenizer that goes with them."""

    size: int
    rows: Mapping[str, RowPlan]
    tensors: Mapping[str, tuple[str, ...]]
    tokenizer_folder: Path  # whose tokenizer files go beside the merged weights
    tokenizer_json: str | None = None  # the content of tokenizer.json where it is not that folder's
    notes: tuple[str, ...] = ()
    # For each row of the donor's table the id that its token has now, -1 where it is gone; None where all stay.
    donor_ids: Sequence[int] | None = None


def model_vocabulary(
    folder: Path, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any] | None
) -> ModelVocabulary:
    """Find a model's vocabulary tensors: embeddings and heads by name, with as many rows as the vocabulary.

    That is config.json's `vocab_size`, or the rows of the embedding where the two differ. Biases of heads count.
    """
    tables = [name for name, shape in shapes.items() if is_embedding(name) and len(shape) == 2]
    heads = [name for name, shape in shapes.items() if is_head(name) and len(shape) == 2]
    stated = config_value(config, "vocab_size")
    if not tables and stated is None:  # `output` and `decoder` are names of other things too
        return ModelVocabulary((), 0, folder)
    sizes = [int(shapes[name][0]) for name in [*tables, *heads]]
    rows = stated if stated in sizes else next(iter(sizes), 0)
    biases = [f"{name.removesuffix('weight')}bias" for name in heads]
    named = [name for name in [*tables, *heads, *biases] if name in shapes and int(shapes[name][0]) == rows]
    return ModelVocabulary(tuple(named), rows, folder)


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json (BPE, WordPiece, WordLevel, Unigram; added tokens). Raises InvalidModel."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise InvalidModel(_no_tokenizer(folder))
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = document["model"]["vocab"]
        # Unigram keeps a list of [token, score]: the place in it is the id.
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((e[0], i) for i, e in enumerate(vocabulary))
        ids = {str(token): int(number) for token, number in pairs}
        ids |= {str(entry["content"]): int(entry["id"]) for entry in document.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise InvalidModel(f"{path} is no tokenizer that can be read: {type(error).__name__} {error}") from error
    if min(ids.values(), default=0) < 0:
        raise InvalidModel(f"{path} has a negative token id; expected ids from 0 on")
    return Tokenizer(ids, document)


def _no_tokenizer(folder: Path) -> str:
    found = [name for name in SENTENCEPIECE_FILES if (folder / name).is_file()]
    if found:
        return (
            f"{folder} has its tokenizer as {found[0]} alone, which cannot be combined; expected {TOKENIZER_FILE}: "
            "load it once with transformers' AutoTokenizer and save it again, which writes that file"
        )
    return f"{folder} has no {TOKENIZER_FILE}; expected one in every model when a recipe says `tokenizer_source`"


def plan_vocabulary(
    recipe: Recipe, models: Mapping[str, ModelVocabulary], elsewhere: Mapping[str, Path] | None = None
) -> VocabularyPlan | None:
    """What becomes of the vocabulary tensors; None where they stay as they are.

    `models` holds each of `recipe.references()` by its text; `elsewhere` the folder of a tokenizer's model that is
    not one of them. Raises InvalidSpec with a line for each problem, InvalidModel for a tokenizer that is missing.
    """
    if recipe.tokenizer is None:
        _check_equal_rows(models)
        return None
    without = [model for model, vocabulary in models.items() if not vocabulary.tensors]
    if without:
        raise InvalidSpec(f"{few(without)}: no embedding that could follow a tokenizer; leave out `tokenizer_source`")
    return _Union(recipe, recipe.tokenizer, models, elsewhere or {}).plan()


def _check_equal_rows(models: Mapping[str, ModelVocabulary]) -> None:
    sizes = {model: vocabulary.rows for model, vocabulary in models.items() if vocabulary.tensors}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{model} has {rows}" for model, rows in sizes.items())
        raise InvalidSpec(
            f"the vocabularies differ in size: {listed}; say `tokenizer_source: union` (or base, or a model) to match "
            "their rows by token"
        )


def mapped_readers(plan: VocabularyPlan, readers: Mapping[str, WeightReader]) -> dict[str, WeightReader]:
    """The models' readers, by their text in the recipe, with the rows of their vocabulary tensors as planned."""
    mapped: dict[str, WeightReader] = {}
    for model, reader in readers.items():
        maps: dict[str, prepared.RowMap] = {}
        for name in () if plan.rows[model].is_identity else plan.tensors[model]:
            kept = reader.ties.get(name, name)
            # Tied tables share one map, by which the mapped reader knows that they are still tied.
            maps[name] = maps[kept] if kept in maps else _row_map(plan, readers, model, name)
        mapped[model] = prepared.RowMappedWeights(reader, maps) if maps else reader
    return mapped


def _row_map(plan: VocabularyPlan, readers: Mapping[str, WeightReader], model: str, name: str) -> prepared.RowMap:
    tables = {other: _counterpart(name, names) for other, names in plan.tensors.items()}
    made: dict[tuple[Row, ...], list[prepared.Row]] = {}
    for rows in plan.rows[model].borrowed.values():
        if rows not in made:  # all padding is the same mean
            made[rows] = [prepared.Row(readers[other], tables[other], row) for other, row in rows]
    return prepared.RowMap(
        plan.rows[model].own, {place: made[rows] for place, rows in plan.rows[model].borrowed.items()}
    )


def _counterpart(name: str, names: Sequence[str]) -> str:
    """The tensor of another model that does the same: by its name, by the end of it, or the table that a head ties.

    Raises InvalidModel.
    """
    if name in names:
        return name
    alike = [other for other in names if other.split(".")[-2:] == name.split(".")[-2:]]
    heads = [other for other in names if is_head(other)]
    tables = [other for other in names if is_embedding(other)]
    for found in (alike, heads if is_head(name) else tables, tables if is_head(name) and not heads else []):
        if len(found) == 1:
            return found[0]
    raise InvalidModel(f"no tensor among {few(list(names))} corresponds to {name}, whose rows are matched by token")


def tokenizers_agree(models: Mapping[str, ModelVocabulary]) -> tuple[str, ...]:
    """Models of equal size whose tokens have other numbers than the first's: notes for the plan."""
    paths = {
        model: vocabulary.folder / TOKENIZER_FILE
        for model, vocabulary in models.items()
        if vocabulary.tensors and (vocabulary.folder / TOKENIZER_FILE).is_file()
    }
    if len(paths) < 2:
        return ()
    first, *others = paths
    whole = paths[first].read_bytes()
    # Most are copies of one file, which need not be parsed.
    different = [model for model in others if paths[model].read_bytes() != whole]
    return tuple(note for model in different if (note := _moved(first, model, paths)) is not None)


def _moved(first: str, model: str, paths: Mapping[str, Path]) -> str | None:
    try:
        ids, other = read_tokenizer(paths[first].parent).ids, read_tokenizer(paths[model].parent).ids
    except InvalidModel as error:
        return f"whether {model} has the tokens of {first} is not known: {error}"
    moved = [token for token, number in ids.items() if other.get(token, number) != number]
    if not moved:
        return None
    return (
        f"{model}: {len(moved)} tokens have other ids than in {first}, such as {moved[0]!r}; rows are merged by number "
        "unless the recipe says `tokenizer_source`"
    )


class _Union:
    """The vocabulary being worked out."""

    def __init__(
        self,
        recipe: Recipe,
        options: TokenizerOptions,
        models: Mapping[str, ModelVocabulary],
        elsewhere: Mapping[str, Path],
    ) -> None:
        self._recipe = recipe
        self._options = options
        self._models = models
        self._donor = str(recipe.donor)
        self._ids = {model: read_tokenizer(vocabulary.folder) for model, vocabulary in models.items()}
        self._source = str(options.source) if isinstance(options.source, ModelReference) else self._donor
        self._folder = models[self._source].folder if self._source in models else elsewhere[self._source]
        self._problems = Problems()

    def plan(self) -> VocabularyPlan:
        given = self._ids[self._source] if self._source in self._ids else read_tokenizer(self._folder)
        ids, added = self._output_ids(given)
        size = self._size(max(ids.values(), default=-1) + 1)
        sources = self._sources(ids)
        rows = {model: self._row_plan(model, ids, size, sources) for model in self._models}
        self._problems.raise_any()
        tensors = {model: vocabulary.tensors for model, vocabulary in self._models.items()}
        document = json.dumps(_with_added(given.document, added), ensure_ascii=False, indent=2) if added else None
        notes = self._notes(ids, size, added)
        return VocabularyPlan(size, rows, tensors, self._folder, document, notes, self._donor_ids(ids, size))

    def _donor_ids(self, ids: Mapping[str, int], size: int) -> Sequence[int] | None:
        rows = self._models[self._donor].rows
        known = {token: row for token, row in self._ids[self._donor].ids.items() if row < rows}
        # Padding keeps its number, unless a token has that now.
        taken = set(ids.values()) | set(known.values())
        moved = [-1 if row in taken or row >= size else row for row in range(rows)]
        for token, row in known.items():
            moved[row] = ids.get(token, moved[row])
        return None if moved == list(range(rows)) else array("q", moved)

    def _output_ids(self, given: Tokenizer) -> tuple[dict[str, int], list[dict[str, Any]]]:
        """The id of each output token, and those that the given tokenizer does not have."""
        ids = dict(given.ids)
        added: list[dict[str, Any]] = []
        wanted = self._every_token() if self._options.source == "union" else {}
        wanted |= {token: {} for token in self._options.tokens if token not in wanted}
        following = given.size
        for token, flags in wanted.items():
            if token not in ids:
                ids[token] = following
                added.append({**_ADDED, **flags, "id": following, "content": token})
                following += 1
        return ids, added

    def _every_token(self) -> dict[str, Mapping[str, Any]]:
        """The tokens of all models, plain ones first, with what their tokenizers say of those that were added."""
        plain: dict[str, Mapping[str, Any]] = {}
        special: dict[str, Mapping[str, Any]] = {}
        for model, tokenizer in self._ids.items():
            details = {str(entry["content"]): entry for entry in tokenizer.document.get("added_tokens", [])}
            for token, row in sorted(tokenizer.ids.items(), key=lambda pair: pair[1]):
                if row < self._models[model].rows:  # a token without a row in its own model is of no use here
                    (special if token in details else plain).setdefault(token, details.get(token, {}))
        return {**plain, **special}

    def _size(self, tokens: int) -> int:
        """Padded tables keep their size: shrinking them breaks whoever relies on it (mergekit cuts them)."""
        multiple = self._options.pad_to_multiple_of
        if multiple is not None:
            return -(-tokens // multiple) * multiple
        if self._recipe.compat == "mergekit":
            return tokens
        kept = self._models[self._source if self._source in self._models else self._donor].rows
        return max(tokens, kept)

    def _row(self, model: str, token: str) -> int | None:
        row = self._ids[model].ids.get(token)
        return row if row is not None and row < self._models[model].rows else None

    def _sources(self, ids: Mapping[str, int]) -> dict[str, tuple[Row, ...]]:
        """For each token that some model lacks or that has a rule: the rows whose mean stands in."""
        sources: dict[str, tuple[Row, ...]] = {}
        for token in ids:
            owners = [(model, row) for model in self._models if (row := self._row(model, token)) is not None]
            rule = self._options.tokens.get(token)
            if rule is not None and rule.source is not None:
                with self._problems.gathered():
                    sources[token] = self._ruled(token, rule)
            elif rule is not None and rule.force:
                self._problems.add(f"token '{token}' has 'force' but no 'source'; say where its embedding comes from")
            elif len(owners) < len(self._models):
                base = [row for row in owners if row[0] == str(self._recipe.base)]
                sources[token] = tuple(base or owners)
        return sources

    def _ruled(self, token: str, rule: TokenRule) -> tuple[Row, ...]:
        if isinstance(rule.source, Zero) or rule.source is None:
            return ()
        reference = rule.source.model if isinstance(rule.source, TokenOf) else rule.source
        model = str(reference)
        if model not in self._models:
            known = few(list(self._models))
            raise InvalidSpec(f"token '{token}' takes its embedding from {model}, which is none of the models: {known}")
        if isinstance(rule.source, TokenOf) and rule.source.token_id is not None:
            row: int | None = rule.source.token_id if rule.source.token_id < self._models[model].rows else None
            wanted = f"row {rule.source.token_id}"
        else:
            text = rule.source.token if isinstance(rule.source, TokenOf) and rule.source.token else token
            row, wanted = self._row(model, text), f"token '{text}'"
        if row is None:
            raise InvalidSpec(f"token '{token}' takes its embedding from {model}, which has no {wanted}")
        return ((model, row),)

    def _row_plan(
        self, model: str, ids: Mapping[str, int], size: int, sources: Mapping[str, tuple[Row, ...]]
    ) -> RowPlan:
        own = np.full(size, -1, dtype=np.int64)
        borrowed: dict[int, tuple[Row, ...]] = {}
        for token, place in ids.items():
            rule = self._options.tokens.get(token)
            row = self._row(model, token)
            if row is not None and not (rule is not None and rule.force):
                own[place] = row
            else:
                borrowed[place] = sources.get(token, ())
        self._fill_padding(model, own, borrowed, set(ids.values()))
        return RowPlan(own, {place: rows for place, rows in borrowed.items() if rows}, self._models[model].rows)

    def _fill_padding(self, model: str, own: np.ndarray, borrowed: dict[int, tuple[Row, ...]], taken: set[int]) -> None:
        """Rows without a token: the model's own padding, or else the mean of its rows (Hewitt 2021).

        Zeros would be a trap: beside a head's usual logits, which are negative, theirs stand out.
        """
        spare = set(range(self._models[model].rows)) - set(self._ids[model].ids.values())
        single = {place: rows for place, rows in borrowed.items() if len(rows) == 1}
        empty = [place for place in range(len(own)) if place not in taken]
        mean = (*((model, int(row)) for row in own[own >= 0]), *(rows[0] for rows in single.values())) if empty else ()
        if self._recipe.compat is None:
            mean = mean[:: 1 + len(mean) // MEAN_ROWS]
        for place in empty:
            if place in spare and self._recipe.compat is None:
                own[place] = place
            else:
                borrowed[place] = mean

    def _notes(self, ids: Mapping[str, int], size: int, added: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        names = sorted({name for vocabulary in self._models.values() for name in vocabulary.tensors})
        notes = [f"vocabulary of {size} rows ({len(ids)} tokens) in {', '.join(names)}, matched by token"]
        if added:
            notes.append(f"{len(added)} tokens are added to the tokenizer of {self._source}")
        return tuple(notes)


_ADDED: Mapping[str, Any] = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}


def _with_added(document: Mapping[str, Any], added: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ordered = [
        {"id": entry["id"], "content": entry["content"], **{key: entry[key] for key in _ADDED}} for entry in added
    ]
    return {**document, "added_tokens": [*document.get("added_tokens", []), *ordered]}
