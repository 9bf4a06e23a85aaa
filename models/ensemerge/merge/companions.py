"""What lies beside the weights of a checkpoint: configuration, tokenizer, model card, and the recipe itself."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from ensemerge.errors import InvalidModel, InvalidSpec, NotFound
from ensemerge.merge.chat_templates import CHAT_TEMPLATES
from ensemerge.merge.citations import CITATIONS
from ensemerge.merge.recipe import Recipe
from ensemerge.merge.references import ModelPath, hub_cache, locate
from ensemerge.merge.vocabulary import TOKENIZER_FILE, VocabularyPlan

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
RECIPE_FILE = "ensemerge_recipe.yaml"
MERGEKIT_RECIPE_FILE = "mergekit_config.yml"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FOLDER = "additional_chat_templates"
# What the plain models of a tokenizer say; after tokens are added they would contradict tokenizer.json.
SUPERSEDED_FILES = (
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "tekken.json",
    "vocab.json",
    "target_vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "bpe.codes",
    "added_tokens.json",
)
# Templates that a chosen one takes the place of: loaders would go on using these.
TEMPLATE_FILES = ("chat_template.json", TEMPLATE_FILE)
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "normalizer.json",
    *SUPERSEDED_FILES,
    *TEMPLATE_FILES,
)
GENERATION_FILE = "generation_config.json"
DONOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SIDE_LAYER_KEYS: Mapping[str, tuple[str, ...]] = {
    "encoder": ("encoder_layers", "num_encoder_layers", "n_encoder_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "n_decoder_layers"),
}
# Lists with an entry for each layer, and lists of the numbers of layers. Any other list may be as long by chance.
LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "attention_types",
    "attention_layers",
    "attention_window",
    "layers_block_type",
    "no_rope_layers",
    "block_configs",
    "num_kv_heads",
    "num_query_heads",
    "ffn_multipliers",
    "num_key_value_heads_per_layer",
)
LAYER_NUMBERS = ("mlp_only_layers", "attn_layer_indices", "moe_layers", "cross_attention_layers")
# How families of layers are called whose configuration stands under a key such as `vision_config`.
PART_NAMES: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "language"),
    "llm": ("llm", "language"),
    "vision": ("vision", "visual"),
}
TOKEN_KEYS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
TOKEN_KEY_ENDINGS = ("_token_id", "_token_ids", "_token_index")
FILE_BYTES_LIMIT = 1 << 28
MOST_LAYERS = 1 << 20  # a list that a broken config would have us write out


@dataclass(frozen=True)
class Facts:
    """What the merge made of the donor: written into config.json where it differs.

    `layers`: for each family of layers whose layers were chosen, the donor's layer that each output layer comes from.
    `donor_layers`: how many layers of each family the donor has.
    """

    dtype: str | None = None
    vocabulary: VocabularyPlan | None = None
    layers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    donor_layers: Mapping[str, int] = field(default_factory=dict)
    untied: bool = False


def write_companions(
    folder: Path,
    recipe: Recipe,
    recipe_text: str,
    donor: Path,
    models: Mapping[str, Path],
    facts: Facts,
    *,
    task: str = "",
    adapters: Mapping[str, Path] | None = None,
) -> tuple[str, ...]:
    """Write everything but the weights into `folder`, and say what a person should look at.

    `donor` and `models` are the folders of the donor and of all models by their text in the recipe; a model that is a
    file has no companions. `recipe_text` is the recipe as given. Files of the donor are copied, never linked. Nothing
    that exists is overwritten. `task` and `adapters` are for the card, see model_card. Raises InvalidSpec,
    InvalidModel.
    """
    writer = _Companions(folder)
    notes: list[str] = []
    config = read_config(donor)
    if config is not None:
        updated, remarks = merged_config(config, facts)
        notes += remarks
        writer.write_json(CONFIG_FILE, updated)
    notes += _write_generation(writer, donor, facts)
    for name in DONOR_FILES:
        writer.copy(donor, name)
    notes += _write_tokenizer(writer, recipe, donor, models, facts)
    writer.write(CARD_FILE, model_card(recipe, recipe_text, models, task=task, adapters=adapters))
    writer.write(RECIPE_FILE, recipe_text)
    if recipe.compat == "mergekit":
        writer.write(MERGEKIT_RECIPE_FILE, recipe_text)
    return tuple(notes)


class _Companions:
    """The output folder: a file that is there stays as it is, and a file that appears is whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, name: str, text: str) -> None:
        """Raises InvalidSpec where there is such a file."""
        self._put(name, io.BytesIO(text.encode("utf-8")))

    def write_json(self, name: str, body: Mapping[str, Any]) -> None:
        """Raises InvalidSpec where there is such a file."""
        self.write(name, json.dumps(body, indent=2, ensure_ascii=False) + "\n")

    def copy(self, source: Path, name: str) -> None:
        """Copy the content of a file, if there is one. The Hub's cache keeps links, so they are followed here."""
        path = source / name
        if not path.is_file():
            return
        size = path.stat().st_size
        if size > FILE_BYTES_LIMIT:
            raise InvalidModel(f"{path} is {size} bytes; expected at most {FILE_BYTES_LIMIT} for a file of this kind")
        with path.open("rb") as file:
            self._put(name, file)

    def copy_folder(self, source: Path, name: str) -> None:
        """Copy the files of a folder, if there is one; not the folders in it."""
        for path in sorted((source / name).glob("*")):
            self.copy(source, f"{name}/{path.name}")

    def _put(self, name: str, content: BinaryIO) -> None:
        path = self._folder / name
        if path.exists():
            raise InvalidSpec(f"{path} exists already; expected a new folder for the merged model")
        path.parent.mkdir(exist_ok=True)
        # Always the same name aside: the next try writes over what a kill left, and moves it away.
        aside = path.with_name(f".{path.name}.part")
        try:
            with aside.open("wb") as file:
                shutil.copyfileobj(content, file)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def read_config(folder: Path) -> dict[str, Any] | None:
    """A model's config.json; None where it has none. Raises InvalidModel."""
    return _read_json(folder / CONFIG_FILE)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidModel(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidModel(f"{path} holds no mapping; expected keys and values")
    return found


def merged_config(config: Mapping[str, Any], facts: Facts) -> tuple[dict[str, Any], list[str]]:
    """The donor's config.json with what the merge changed, and what could not be changed in it."""
    updated: dict[str, Any] = json.loads(json.dumps(config))
    notes: list[str] = []
    if facts.dtype is not None:
        _set_dtype(updated, facts.dtype)
    if facts.vocabulary is not None:
        _set(updated, "vocab_size", facts.vocabulary.size)
        notes += _renumber_tokens(updated, facts.vocabulary, CONFIG_FILE)
    if facts.untied:
        _set(updated, "tie_word_embeddings", False)
    if facts.layers:
        notes += _LayerCounts(config, updated, facts).write()
    return updated, notes


def _part_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys that hold the configuration of a part of the network, such as `text_config`."""
    keys = [key for key, part in config.items() if isinstance(part, dict)]
    named = [key for key in keys if key.endswith("_config") or key in SIDE_LAYER_KEYS]
    return [key for key in named if key != "quantization_config"]


def _set(config: dict[str, Any], key: str, value: object) -> None:
    text = config.get("text_config")
    holders = [part for part in (config, text) if isinstance(part, dict) and key in part]
    for part in holders or [config]:
        part[key] = value


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Wherever the donor says it: `torch_dtype`, or `dtype` as transformers calls it since version 5."""
    parts = [config, *(config[key] for key in _part_keys(config))]
    places = [(part, key) for part in parts for key in ("torch_dtype", "dtype") if key in part]
    for part, key in places or [(config, "torch_dtype")]:
        part[key] = dtype


@dataclass(frozen=True)
class _Place:
    """Where the config speaks of a family of layers: the key of a part, "" for none, and `encoder` or `decoder`."""

    part: str
    side: str


class _LayerCounts:
    """Layer counts, and lists with an entry for each layer (`layer_types`), follow the chosen layers.

    `config` is read and stays as it is, so that one family's new count is not taken for another's old one.
    """

    def __init__(self, config: Mapping[str, Any], updated: dict[str, Any], facts: Facts) -> None:
        self._config = config
        self._updated = updated
        self._facts = facts
        self._places = {family: self._place(family) for family in {**facts.donor_layers, **facts.layers}}

    def write(self) -> list[str]:
        """Change `updated`; returns remarks."""
        return [note for family in self._facts.layers for note in self._follow(family)]

    def _place(self, family: str) -> _Place:
        segments = family.split(".")
        parts = {key: PART_NAMES.get(stem := key.removesuffix("_config"), (stem,)) for key in _part_keys(self._config)}
        for i, segment in enumerate(segments):
            for key, names in parts.items():
                if segment.startswith(tuple(f"{name}_" for name in names)) or segment in names:
                    return _Place(key, _side(segments[i + 1 :]))
        return _Place("", _side(segments))

    def _follow(self, family: str) -> list[str]:
        picks, before = self._facts.layers[family], self._facts.donor_layers.get(family, 0)
        if list(picks) == list(range(before)):
            return []
        notes: list[str] = []
        found: set[str] = set()
        for path in self._holders(self._places[family].part):
            old, new = _at(self._config, path), _at(self._updated, path)
            keys = [key for key in self._keys(family) if type(old.get(key)) is int and old[key] == before]
            found |= set(keys)
            new.update(dict.fromkeys(keys, len(picks)))
            if keys:
                notes += self._follow_lists(family, old, new)
        if not found:
            return [*notes, self._by_hand(family)] if len(picks) != before else notes
        return [*notes, *self._doubts(family, found)]

    def _holders(self, part: str) -> list[str]:
        """The language model's configuration stands under `text_config`, beside the parts, or at both places."""
        if part not in ("", "text_config"):
            return [part]
        return ["", "text_config"] if isinstance(self._config.get("text_config"), dict) else [""]

    def _two_sided(self, part: str) -> bool:
        return {"encoder", "decoder"} <= {place.side for place in self._places.values() if place.part == part}

    def _keys(self, family: str) -> tuple[str, ...]:
        """In an encoder–decoder the plain keys (T5's `num_layers`, BART's `num_hidden_layers`) are the encoder's."""
        place = self._places[family]
        own = SIDE_LAYER_KEYS.get(place.side, ())
        return own if place.side == "decoder" and self._two_sided(place.part) else (*LAYER_KEYS, *own)

    def _by_hand(self, family: str) -> str:
        before, after = self._facts.donor_layers.get(family, 0), len(self._facts.layers[family])
        return f"{CONFIG_FILE} has no key that says {before} layers ({family}); set it to {after} by hand"

    def _doubts(self, family: str, found: set[str]) -> list[str]:
        """Remarks where a key that was changed may mean other layers as well."""
        place, facts = self._places[family], self._facts
        rivals = [
            other
            for other, count in facts.donor_layers.items()
            if count == facts.donor_layers.get(family, 0)
            and self._places[other].part == place.part
            and (found & set(self._keys(other)) or self._lacks_own_key(other))
            and list(facts.layers.get(other, range(count))) != list(facts.layers[family])
        ]
        keys = ", ".join(sorted(found))
        after = len(facts.layers[family])
        return [
            f"{CONFIG_FILE}: {keys} may mean {other} as well as {family}, for which it says {after} now; check it"
            for other in rivals
        ]

    def _lacks_own_key(self, family: str) -> bool:
        """A decoder without a key has as many layers as the encoder's says (T5)."""
        place = self._places[family]
        if place.side != "decoder":
            return False
        return not any(
            key in _at(self._config, path) for path in self._holders(place.part) for key in self._keys(family)
        )

    def _follow_lists(self, family: str, old: Mapping[str, Any], new: dict[str, Any]) -> list[str]:
        picks, before = self._facts.layers[family], self._facts.donor_layers.get(family, 0)
        either = self._two_sided(self._places[family].part)
        notes = []
        for key, value in old.items():
            if not isinstance(value, list) or key == "architectures" or _names_tokens(key):
                continue
            followed = None if either else _followed(key, value, picks, before)
            if followed is not None:
                new[key] = followed
            elif len(value) == before or key in LAYER_NUMBERS:
                notes.append(f"{CONFIG_FILE}: '{key}' stays as it is; it may say something of each layer of {family}")
        return notes


def _side(segments: Sequence[str]) -> str:
    return next((segment for segment in segments if segment in SIDE_LAYER_KEYS), "")


def _at(config: Any, key: str) -> dict[str, Any]:
    part: dict[str, Any] = config[key] if key else config
    return part


def _followed(key: str, value: list[Any], picks: Sequence[int], before: int) -> list[Any] | None:
    """A list about layers after some were chosen; None for any other."""
    if key in LAYER_NUMBERS:
        return [i for i, pick in enumerate(picks) if pick in value]
    if key not in LAYER_LISTS:
        return None
    if len(value) == before and not (key == "attention_types" and _runs(value)):
        return [value[i] for i in picks]
    # GPT-Neo's `attention_types`: [[kinds, how often], …].
    each = [kind for kinds, times in value for kind in kinds * times] if _runs(value) else []
    return [[[each[i] for i in picks], 1]] if len(each) == before else None


def _runs(value: list[Any]) -> bool:
    return (
        all(
            isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list) and type(entry[1]) is int
            for entry in value
        )
        and sum(len(entry[0]) * entry[1] for entry in value) < MOST_LAYERS
    )


# Ids of tokens.


def _names_tokens(key: str) -> bool:
    return key in TOKEN_KEYS or key.endswith(TOKEN_KEY_ENDINGS)


def _write_generation(writer: _Companions, donor: Path, facts: Facts) -> list[str]:
    plan = facts.vocabulary
    generation = None if plan is None or plan.donor_ids is None else _read_json(donor / GENERATION_FILE)
    if plan is None or generation is None:
        writer.copy(donor, GENERATION_FILE)
        return []
    notes = _renumber_tokens(generation, plan, GENERATION_FILE)
    writer.write_json(GENERATION_FILE, generation)
    return notes


def _renumber_tokens(config: dict[str, Any], plan: VocabularyPlan, file: str) -> list[str]:
    """Ids of the donor's tokens become those of the same tokens in the merged vocabulary; returns remarks."""
    ids = plan.donor_ids
    if ids is None:
        return []
    notes: list[str] = []
    for key, value in list(config.items()):
        if isinstance(value, dict):
            notes += _renumber_tokens(value, plan, file)
        elif _names_tokens(key) and value is not None:
            config[key] = _renumbered(value, ids)
            if config[key] is None:
                del config[key]
            if _count(config.get(key)) < _count(value):
                notes.append(
                    f"{file}: '{key}' was {value}, and the merged tokenizer lacks such a token; what it lacks is left "
                    "out, and a loader takes its default for a key that is missing: set it by hand"
                )
    return notes


def _renumbered(value: object, ids: Sequence[int]) -> Any:
    """An id, ids, or sequences of ids, by their new numbers; None where nothing is left."""
    if isinstance(value, list):
        # A sequence of tokens of which one is gone is another sequence.
        entries = [_whole(entry, ids) if isinstance(entry, list) else _renumbered(entry, ids) for entry in value]
        kept = [entry for entry in entries if entry is not None]
        return kept if kept or not value else None
    if type(value) is not int or value < 0:
        return value
    new = ids[value] if value < len(ids) else -1
    return int(new) if new >= 0 else None


def _whole(sequence: list[Any], ids: Sequence[int]) -> list[Any] | None:
    found = [_renumbered(entry, ids) for entry in sequence]
    return None if None in found else found


def _count(value: object) -> int:
    return len(value) if isinstance(value, list) else int(value is not None)


# Tokenizer and chat template.


def _write_tokenizer(
    writer: _Companions, recipe: Recipe, donor: Path, models: Mapping[str, Path], facts: Facts
) -> list[str]:
    plan = facts.vocabulary
    source = donor if plan is None else plan.tokenizer_folder
    template = chosen_template(recipe, models)
    rewritten = plan is not None and plan.tokenizer_json is not None
    skipped = {TOKENIZER_CONFIG_FILE, *TEMPLATE_FILES} if template is not None else set()
    skipped |= {TOKENIZER_FILE, *SUPERSEDED_FILES} if rewritten else set()
    for name in TOKENIZER_FILES:
        if name not in skipped:
            writer.copy(source, name)
    if plan is not None and plan.tokenizer_json is not None:
        writer.write(TOKENIZER_FILE, plan.tokenizer_json)
    if template is None:
        writer.copy_folder(source, TEMPLATE_FOLDER)
        return [] if recipe.chat_template is None else ["no model has a chat template; none is written"]
    writer.write(TEMPLATE_FILE, template)
    config = _read_json(source / TOKENIZER_CONFIG_FILE)
    if config is None:
        return [f"the chat template stands in {TEMPLATE_FILE} alone: there is no {TOKENIZER_CONFIG_FILE}"]
    writer.write_json(TOKENIZER_CONFIG_FILE, {**config, "chat_template": template})
    return []


def chosen_template(recipe: Recipe, models: Mapping[str, Path]) -> str | None:
    """The chat template that a recipe asks for: `auto` (the commonest of the models'), a name, or Jinja itself.

    None where it asks for none, or where no model has one.
    """
    wanted = recipe.chat_template
    if wanted is None:
        return None
    if wanted == "auto":
        found = [template for folder in models.values() if (template := _template_of(folder)) is not None]
        return Counter(found).most_common(1)[0][0] if found else None
    return CHAT_TEMPLATES.get(wanted, wanted)


def _template_of(folder: Path) -> str | None:
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8").strip() or None
    found = (_read_json(folder / TOKENIZER_CONFIG_FILE) or {}).get("chat_template")
    if isinstance(found, list):  # several, each with a name
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found.strip() or None if isinstance(found, str) else None


# The model card.


def model_card(
    recipe: Recipe,
    recipe_text: str,
    models: Mapping[str, Path],
    *,
    task: str = "",
    adapters: Mapping[str, Path] | None = None,
) -> str:
    """README.md: front matter that the Hub reads, then what was merged, how, and from which recipe.

    `task` is the model for whose task this output is, where a merge has one for each. `adapters`: where each adapter
    lies, by its text in the recipe; one that is not there is looked for from the working directory.
    """
    front, licences = _front_matter(recipe, models, adapters or {})
    cited = f" ({CITATIONS[recipe.method]})" if recipe.method in CITATIONS else ""
    base = f" The base model is `{recipe.base}`." if recipe.base else ""
    meant = f" This is the model for the task of `{task}`." if task else ""
    listed = "\n".join(f"- `{model}`{_licence_note(licences.get(str(model)))}" for model in recipe.references())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# {_title(recipe)}{f': {task}' if task else ''}\n\n"
        f"Weights merged with ensemerge by the method `{recipe.method}`{cited}.{base}{meant}\n\n"
        f"## Models\n\n{listed}\n\n## Recipe\n\n{_fenced(recipe_text)}\n"
    )


def _front_matter(
    recipe: Recipe, models: Mapping[str, Path], adapters: Mapping[str, Path]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the Hub reads, and the licence of each model that states one."""
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "ensemerge"]}
    repositories = _repositories(recipe, models, adapters)
    if repositories:
        front = {"base_model": repositories, **front}
    licences, agreed = _licences(models)
    if agreed is not None:
        front["license"] = agreed
    return front, licences


def _title(recipe: Recipe) -> str:
    names = dict.fromkeys(model.model.path.rstrip("/").split("/")[-1] for model in recipe.references())
    return recipe.name or f"Merge of {', '.join(names)}"


def _repositories(recipe: Recipe, models: Mapping[str, Path], adapters: Mapping[str, Path]) -> list[str]:
    """What the Hub can link to: the repositories of models and adapters that came from Hugging Face's cache."""
    found: dict[str, None] = {}
    for reference in recipe.references():
        places = [models.get(str(reference))]
        if reference.lora is not None:
            places.append(adapters.get(str(reference.lora)) or _located(reference.lora))
        found |= dict.fromkeys(name for place in places if place and (name := _repository(place)) is not None)
    return list(found)


def _located(path: ModelPath) -> Path | None:
    try:
        return locate(path, Path.cwd())
    except NotFound:
        return None


def _repository(path: Path) -> str | None:
    """The repository of a path in the cache, which has it under `models--owner--name`; None anywhere else."""
    cache = hub_cache().absolute()
    if not path.absolute().is_relative_to(cache):
        return None
    top = next(iter(path.absolute().relative_to(cache).parts), "")
    return top.removeprefix("models--").replace("--", "/") if top.startswith("models--") else None


def _licences(models: Mapping[str, Path]) -> tuple[dict[str, str], str | None]:
    """What each model's card states, and the licence of all if every one states the same."""
    found = {model: licence for model, folder in models.items() if (licence := _stated_licence(folder)) is not None}
    stated = set(found.values())
    return found, stated.pop() if len(stated) == 1 and len(found) == len(models) else None


def _stated_licence(folder: Path) -> str | None:
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    start, _, rest = text.partition("---\n")
    if start.strip():
        return None
    try:
        front = yaml.safe_load(rest.partition("\n---")[0])
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    return licence if isinstance(licence, str) else None


def _licence_note(licence: str | None) -> str:
    return "" if licence is None else f" ({licence})"


def _fenced(text: str) -> str:
    """A fence that the text itself does not hold."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"
