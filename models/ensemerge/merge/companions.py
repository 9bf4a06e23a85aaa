"""What lies beside the weights of a checkpoint: configuration, tokenizer, model card, and the recipe itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ensemerge.errors import InvalidModel, InvalidSpec
from ensemerge.merge.chat_templates import CHAT_TEMPLATES
from ensemerge.merge.citations import CITATIONS
from ensemerge.merge.naming import config_value
from ensemerge.merge.recipe import Recipe
from ensemerge.merge.vocabulary import TOKENIZER_FILE, VocabularyPlan

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
RECIPE_FILE = "ensemerge_recipe.yaml"
MERGEKIT_RECIPE_FILE = "mergekit_config.yml"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "chat_template.json",
    TEMPLATE_FILE,
)
# What the plain models of a tokenizer say; after tokens are added they would contradict tokenizer.json.
SUPERSEDED_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
DONOR_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
LAYER_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
FILE_BYTES_LIMIT = 1 << 28


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
) -> tuple[str, ...]:
    """Write everything but the weights into `folder`, and say what a person should look at.

    `donor` and `models` are the folders of the donor and of all models by their text in the recipe; a model that is a
    file has no companions. `recipe_text` is the recipe as given. Files of the donor are copied, never linked. Nothing
    that exists is overwritten. Raises InvalidSpec, InvalidModel.
    """
    writer = _Companions(folder)
    notes: list[str] = []
    config = read_config(donor)
    if config is not None:
        updated, remarks = merged_config(config, facts)
        notes += remarks
        writer.write(CONFIG_FILE, json.dumps(updated, indent=2, ensure_ascii=False) + "\n")
    for name in DONOR_FILES:
        writer.copy(donor, name)
    notes += _write_tokenizer(writer, recipe, donor, models, facts)
    writer.write(CARD_FILE, model_card(recipe, recipe_text, models))
    writer.write(RECIPE_FILE, recipe_text)
    if recipe.compat == "mergekit":
        writer.write(MERGEKIT_RECIPE_FILE, recipe_text)
    return tuple(notes)


class _Companions:
    """The output folder: a file that is there stays as it is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, name: str, text: str) -> None:
        path = self._folder / name
        try:
            with path.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
        except FileExistsError as error:
            raise InvalidSpec(f"{path} exists already; expected a new folder for the merged model") from error

    def copy(self, source: Path, name: str) -> None:
        """Copy the content of a file, if there is one. The Hub's cache keeps links, so they are followed here."""
        path = source / name
        if not path.is_file():
            return
        size = path.stat().st_size
        if size > FILE_BYTES_LIMIT:
            raise InvalidModel(f"{path} is {size} bytes; expected at most {FILE_BYTES_LIMIT} for a file of this kind")
        with (self._folder / name).open("xb") as file:
            file.write(path.read_bytes())


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
        _set(updated, "dtype" if config_value(config, "dtype") else "torch_dtype", facts.dtype)
    if facts.vocabulary is not None:
        _set(updated, "vocab_size", facts.vocabulary.size)
    if facts.untied:
        _set(updated, "tie_word_embeddings", False)
    for family, picks in facts.layers.items():
        notes += _set_layers(updated, family, picks, facts.donor_layers.get(family, 0))
    return updated, notes


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config and its parts: models of several keep the language model's under `text_config`."""
    return [config, *(part for key, part in config.items() if key.endswith("_config") and isinstance(part, dict))]


def _set(config: dict[str, Any], key: str, value: object) -> None:
    text = config.get("text_config")
    holders = [part for part in (config, text) if isinstance(part, dict) and key in part]
    for part in holders or [config]:
        part[key] = value


def _set_layers(config: dict[str, Any], family: str, picks: Sequence[int], before: int) -> list[str]:
    """Layer counts, and lists with an entry for each layer (`layer_types`), follow the chosen layers."""
    for part in _parts(config):
        keys = [key for key in LAYER_KEYS if part.get(key) == before and type(part[key]) is int]
        if not keys:
            continue
        part[keys[0]] = len(picks)
        for key, value in part.items():
            if isinstance(value, list) and len(value) == before and key != "architectures":
                part[key] = [value[i] for i in picks if i < before]
        return []
    if len(picks) == before:
        return []
    return [f"{CONFIG_FILE} has no key that says {before} layers ({family}); set it to {len(picks)} by hand"]


# Tokenizer and chat template.


def _write_tokenizer(
    writer: _Companions, recipe: Recipe, donor: Path, models: Mapping[str, Path], facts: Facts
) -> list[str]:
    plan = facts.vocabulary
    source = donor if plan is None else plan.tokenizer_folder
    template = chosen_template(recipe, models)
    rewritten = plan is not None and plan.tokenizer_json is not None
    skipped = {TOKENIZER_CONFIG_FILE, TEMPLATE_FILE} if template is not None else set()
    skipped |= {TOKENIZER_FILE, *SUPERSEDED_FILES} if rewritten else set()
    for name in TOKENIZER_FILES:
        if name not in skipped:
            writer.copy(source, name)
    if plan is not None and plan.tokenizer_json is not None:
        writer.write(TOKENIZER_FILE, plan.tokenizer_json)
    if template is None:
        return [] if recipe.chat_template is None else ["no model has a chat template; none is written"]
    writer.write(TEMPLATE_FILE, template)
    config = _read_json(source / TOKENIZER_CONFIG_FILE)
    if config is None:
        return [f"the chat template stands in {TEMPLATE_FILE} alone: there is no {TOKENIZER_CONFIG_FILE}"]
    text = json.dumps({**config, "chat_template": template}, indent=2, ensure_ascii=False)
    writer.write(TOKENIZER_CONFIG_FILE, text + "\n")
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


def model_card(recipe: Recipe, recipe_text: str, models: Mapping[str, Path]) -> str:
    """README.md: front matter that the Hub reads, then what was merged, how, and from which recipe."""
    repositories = [str(model.model) for model in recipe.references() if not _is_local(model.model.path)]
    front: dict[str, Any] = {"base_model": repositories, "library_name": "transformers", "tags": ["merge", "ensemerge"]}
    if not repositories:
        del front["base_model"]
    licences, agreed = _licences(models)
    if agreed is not None:
        front["license"] = agreed
    cited = f" ({CITATIONS[recipe.method]})" if recipe.method in CITATIONS else ""
    base = f" The base model is `{recipe.base}`." if recipe.base else ""
    listed = "\n".join(f"- `{model}`{_licence_note(licences.get(str(model)))}" for model in recipe.references())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# {_title(recipe)}\n\n"
        f"Weights merged with ensemerge by the method `{recipe.method}`{cited}.{base}\n\n"
        f"## Models\n\n{listed}\n\n## Recipe\n\n{_fenced(recipe_text)}\n"
    )


def _title(recipe: Recipe) -> str:
    names = dict.fromkeys(model.model.path.rstrip("/").split("/")[-1] for model in recipe.references())
    return recipe.name or f"Merge of {', '.join(names)}"


def _is_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).exists()


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
