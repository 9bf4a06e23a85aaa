"""A merge as a person writes it: mergekit's recipe language and what this library adds to it (docs/recipes.md).

merge_method: ties
base_model: org/base
models:
  - {model: org/code, parameters: {density: 0.5, weight: 0.5}}
  - {model: org/chat, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
parameters: {normalize: true}
dtype: bfloat16

A `kind: merge` model.yaml holds the same. Nothing here needs torch: the server reads such files too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any, Protocol, TypeVar

from ensemerge.errors import InvalidSpec
from ensemerge.fields import Fields, checked, describe, suggest
from ensemerge.merge.alignment_spec import Alignment, split_alignment
from ensemerge.merge.chat_templates import CHAT_TEMPLATES
from ensemerge.merge.parameters import Condition, Declaration, Settings, parse_settings
from ensemerge.merge.problems import Problems
from ensemerge.merge.references import ModelReference, parse_model
from ensemerge.merge.yaml_text import read_documents
from ensemerge.repository import Spec, is_name

T = TypeVar("T")

RESTORERS = ("batch_norm", "repair", "auto", "nothing")
DTYPES = ("float16", "bfloat16", "float32", "float64")
COMPATIBLE = ("mergekit",)
TENSORS = ("all", "intersection", "union")
TOKENIZER_SOURCES = ("union", "base")
WEIGHT_OF_ONE: Settings = {"weight": (Condition(None, 1.0),)}
SHORTEST_TEMPLATE = 20  # what is shorter is a name, misspelt


class Declared(Protocol):
    """A method of the table, as far as a recipe must know it."""

    @property
    def parameters(self) -> Sequence[Declaration]: ...


@dataclass(frozen=True)
class Source:
    """One model of a merge, its layers `[start, end)` where they are chosen, and its own parameters."""

    model: ModelReference
    parameters: Settings = field(default_factory=dict)
    layer_range: tuple[int, int] | None = None


@dataclass(frozen=True)
class Slice:
    """A stretch of output layers: as many layers of each source, merged."""

    sources: tuple[Source, ...]
    base: ModelReference | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Module:
    """One part of a network of several, such as the vision tower: models, or slices of them."""

    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Zero:
    """A token whose embedding is zeros."""


@dataclass(frozen=True)
class TokenOf:
    """A token that takes the embedding of a model's token, by its text or by its id."""

    model: ModelReference
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class TokenRule:
    """Where a token's embedding comes from; `force` sets it in the models that have the token as well."""

    source: ModelReference | Zero | TokenOf | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerOptions:
    """Which tokenizer the merged model has: `union`, `base` or a model's."""

    source: str | ModelReference = "union"
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class Calibration:
    """Unlabelled inputs (an .npz beside model.yaml, arrays `(rows, …)` by input name) and what they restore."""

    data: str
    restore: str


@dataclass(frozen=True)
class Recipe:
    """A merge as data. Exactly one of `models`, `slices` and `modules` is filled."""

    method: str
    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    modules: Mapping[str, Module] = field(default_factory=dict)
    base: ModelReference | None = None
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None  # what weights are rounded to before the method sees them
    out_dtype: str | None = None  # what the result is rounded to
    tokenizer: TokenizerOptions | None = None
    chat_template: str | None = None
    name: str | None = None
    compat: str | None = None
    seed: int = 0
    tensors: str = "all"
    calibration: Calibration | None = None
    alignment: Alignment | None = None
    trunk: str | None = None  # the value of the donor's graph up to which ONNX models are merged
    defaults: Settings = field(default_factory=dict)  # what holds where the recipe says nothing
    body: Mapping[str, Any] = field(default_factory=dict, compare=False)  # as it was written

    def references(self) -> list[ModelReference]:
        """Every model whose weights go into the merge, once each, in the order of the recipe, the base last."""
        parts = [Module(self.models, self.slices), *self.modules.values()]
        found: list[ModelReference | None] = []
        for part in parts:
            found += [source.model for source in part.models]
            for piece in part.slices:
                found += [*(source.model for source in piece.sources), piece.base]
        return list(dict.fromkeys(model for model in [*found, self.base] if model is not None))

    @property
    def donor(self) -> ModelReference:
        """The model that gives configuration and tokenizer: the base, or else the first."""
        return self.base or self.references()[0]

    def needs(self, names: Sequence[str]) -> list[str]:
        """Those of `names`, other recipes of the same file, that this one uses as models."""
        paths = {reference.model.path for reference in [*self.references(), *self._token_models()]}
        return [name for name in names if name in paths]

    def _token_models(self) -> list[ModelReference]:
        if self.tokenizer is None:
            return []
        sources = [rule.source for rule in self.tokenizer.tokens.values()]
        models = [source.model if isinstance(source, TokenOf) else source for source in sources]
        return [model for model in [*models, self.tokenizer.source] if isinstance(model, ModelReference)]


def parse_recipes(text: str, where: str, methods: Mapping[str, Declared] | None = None) -> list[Recipe]:
    """Read a recipe file: one merge, or several documents that may use each other's `name` as a model.

    They come in an order in which each follows those it needs; one may go without a name, and comes last.
    `methods` is the table that names of methods and parameters are checked against. Raises InvalidSpec, a line for
    each problem.
    """
    documents = read_documents(text, where)
    if not documents:
        raise InvalidSpec(f"{where} is empty; expected `merge_method` and `models`, `slices` or `modules`")
    problems = Problems()
    recipes: list[Recipe] = []
    for number, document in enumerate(documents):
        with problems.gathered():
            place = where if len(documents) == 1 else f"{where}: document {number + 1}"
            recipes.append(parse_recipe(document, place, methods))
    problems.raise_any()
    return _ordered(recipes, where)


def _ordered(recipes: Sequence[Recipe], where: str) -> list[Recipe]:
    by_name = {recipe.name: recipe for recipe in recipes}
    if len(by_name) != len(recipes):
        names = ", ".join(recipe.name or "none" for recipe in recipes)
        raise InvalidSpec(f"{where}: expected a different `name` in each document, one may have none; got {names}")
    named = [recipe.name for recipe in recipes if recipe.name is not None]
    needs = {name: by_name[name].needs(named) for name in named}
    try:
        order = [by_name[name] for name in TopologicalSorter(needs).static_order()]
    except CycleError as error:
        raise InvalidSpec(f"{where}: merges that need each other: {' → '.join(error.args[1])}") from error
    return [*order, *(recipe for recipe in recipes if recipe.name is None)]


def parse_recipe(body: object, where: str, methods: Mapping[str, Declared] | None = None) -> Recipe:
    """Read one recipe. Raises InvalidSpec with a line for each problem."""
    rest, alignment = split_alignment(body, where)
    recipe = _Parser(where, methods).recipe(Fields(rest, where, taken=("align",)))
    return replace(recipe, alignment=alignment, body=body if isinstance(body, Mapping) else {})


def parse_model_yaml(spec: Spec, methods: Mapping[str, Declared] | None = None) -> Recipe:
    """Read the body of a `kind: merge` model.yaml: the method is linear and every weight 1 unless it says otherwise.

    Raises InvalidSpec with a line for each problem.
    """
    body, alignment = split_alignment({"merge_method": "linear", **spec.body}, spec.where)
    recipe = _Parser(spec.where, methods).recipe(Fields(body, spec.where, taken=("kind", "task", "align")))
    return replace(recipe, alignment=alignment, defaults=WEIGHT_OF_ONE, body=spec.body)


class _Parser:
    """Reads the parts of one recipe and keeps what is wrong with them."""

    def __init__(self, where: str, methods: Mapping[str, Declared] | None) -> None:
        self._where = where
        self._methods = methods
        self._declared: Sequence[Declaration] | None = None
        self._problems = Problems()

    def recipe(self, fields: Fields) -> Recipe:
        method = self._method(fields)
        parts = self._module(fields, self._where)
        modules = self._modules(fields)
        recipe = Recipe(
            method,
            parts.models,
            parts.slices,
            modules,
            self._model(fields, "base_model"),
            parts.parameters,
            self._dtype(fields, "dtype"),
            self._dtype(fields, "out_dtype"),
            self._tokenizer(fields),
            self._template(fields),
            self._name(fields),
            self._choice(fields, "compat", COMPATIBLE),
            self._take(fields, "seed", int) or 0,
            self._choice(fields, "tensors", TENSORS) or "all",
            self._calibration(fields),
            trunk=self._take(fields, "trunk", str),
        )
        with self._problems.gathered():
            fields.finish()
        self._check_parts(recipe)
        self._problems.raise_any()
        return recipe

    def _check_parts(self, recipe: Recipe) -> None:
        filled = [name for name in ("models", "slices", "modules") if getattr(recipe, name)]
        if len(filled) != 1 and not self._problems.lines:
            got = " and ".join(filled) or "none of them"
            self._problems.add(f"{self._where}: expected one of 'models', 'slices' and 'modules', got {got}")

    def _method(self, fields: Fields) -> str:
        method = self._take(fields, "merge_method", str)
        if method is None:
            self._problems.add(f"{self._where}: 'merge_method' is missing; expected a method such as linear or ties")
            return ""
        if self._methods is not None:
            if method in self._methods:
                self._declared = self._methods[method].parameters
            else:
                ending = suggest(method, list(self._methods))
                self._problems.add(f"{self._where}: 'merge_method' is '{method}'; {ending}")
        return method

    def _module(self, fields: Fields, where: str) -> Module:
        models = self._list(fields, "models")
        slices = self._list(fields, "slices")
        parsed = [self._source(entry, f"{where}: models[{i}]") for i, entry in enumerate(models)]
        pieces = [self._slice(entry, f"{where}: slices[{i}]") for i, entry in enumerate(slices)]
        settings = self._settings(fields, where)
        return Module(tuple(filter(None, parsed)), tuple(filter(None, pieces)), settings)

    def _modules(self, fields: Fields) -> dict[str, Module]:
        modules: dict[str, Module] = {}
        for name, entry in (self._take(fields, "modules", dict) or {}).items():
            where = f"{self._where}: modules: {name}"
            with self._problems.gathered():
                inner = Fields(entry, where)
                modules[str(name)] = module = self._module(inner, where)
                inner.finish()
                if bool(module.models) == bool(module.slices) and not self._problems.lines:
                    self._problems.add(f"{where}: expected either 'models' or 'slices'")
        return modules

    def _source(self, entry: object, where: str) -> Source | None:
        if isinstance(entry, str):  # ours: a name alone
            entry = {"model": entry}
        with self._problems.gathered():
            fields = Fields(entry, where)
            model = parse_model(fields.take("model", object), f"{where}: 'model'")
            parameters = self._own_settings(fields, where)
            fields.finish()
            return Source(model, parameters)
        return None

    def _slice(self, entry: object, where: str) -> Slice | None:
        with self._problems.gathered():
            fields = Fields(entry, where)
            entries = fields.take("sources", list)
            if not entries:
                raise InvalidSpec(f"{where}: 'sources' is empty; expected at least one {{model, layer_range}}")
            sources = [self._slice_source(inner, f"{where}: sources[{i}]") for i, inner in enumerate(entries)]
            base = self._model(fields, "base_model")
            fields.take("residual_weight", float, None)  # mergekit reads it and never uses it
            parameters = self._settings(fields, where)
            fields.finish()
            return self._even_slice(Slice(tuple(filter(None, sources)), base, parameters), where)
        return None

    def _slice_source(self, entry: object, where: str) -> Source | None:
        with self._problems.gathered():
            fields = Fields(entry, where)
            model = parse_model(fields.take("model", object), f"{where}: 'model'")
            layers = _layer_range(fields.take("layer_range", list), f"{where}: 'layer_range'")
            parameters = self._own_settings(fields, where)
            fields.finish()
            return Source(model, parameters, layers)
        return None

    def _even_slice(self, piece: Slice, where: str) -> Slice:
        counts = {source.layer_range[1] - source.layer_range[0] for source in piece.sources if source.layer_range}
        if len(counts) > 1:
            got = ", ".join(f"{source.model} {list(source.layer_range or ())}" for source in piece.sources)
            raise InvalidSpec(f"{where}: expected as many layers of every source, got {got}")
        return piece

    def _settings(self, fields: Fields, where: str) -> Settings:
        """Parameters that hold for all models: any of the method's."""
        with self._problems.gathered():
            return parse_settings(_parameters(fields, where), f"{where}: parameters", self._declared)
        return {}

    def _own_settings(self, fields: Fields, where: str) -> Settings:
        """Parameters of one model: those that the method has for each."""
        body = _parameters(fields, where)
        if self._declared is None:
            return parse_settings(body, f"{where}: parameters", None)
        own = [declaration for declaration in self._declared if declaration.per_model]
        shared = [declaration for declaration in self._declared if not declaration.per_model]
        return parse_settings(body, f"{where}: parameters", own, shared)

    def _tokenizer(self, fields: Fields) -> TokenizerOptions | None:
        with self._problems.gathered():
            source = fields.take("tokenizer_source", object, None)
            options = fields.take("tokenizer", dict, None)
            if source is not None and options is not None:
                raise InvalidSpec(f"{self._where}: 'tokenizer_source' and 'tokenizer' both; expected one of them")
            if source is not None:
                return TokenizerOptions(_tokenizer_source(source, f"{self._where}: 'tokenizer_source'"))
            return None if options is None else _tokenizer_options(options, f"{self._where}: tokenizer")
        return None

    def _calibration(self, fields: Fields) -> Calibration | None:
        with self._problems.gathered():
            entry = fields.take("calibration", dict, None)
            if entry is None:
                return None
            inner = Fields(entry, f"{self._where}: calibration")
            calibration = Calibration(inner.take("data", str), inner.choose("restore", RESTORERS, "batch_norm"))
            inner.finish()
            return calibration
        return None

    def _dtype(self, fields: Fields, key: str) -> str | None:
        name = self._take(fields, key, str)
        name = None if name is None else name.removeprefix("torch.")
        if name is not None and name not in DTYPES:
            self._problems.add(f"{self._where}: '{key}' is '{name}'; {suggest(name, DTYPES)}")
        return name

    def _template(self, fields: Fields) -> str | None:
        template = self._take(fields, "chat_template", str)
        if template is None or template == "auto" or template in CHAT_TEMPLATES:
            return template
        if len(template) < SHORTEST_TEMPLATE or "{" not in template:
            ending = suggest(template, ["auto", *CHAT_TEMPLATES])
            self._problems.add(f"{self._where}: 'chat_template' is '{template}'; {ending}, or a template in Jinja")
        return template

    def _name(self, fields: Fields) -> str | None:
        name = self._take(fields, "name", str)
        if name is not None and not is_name(name):
            self._problems.add(f"{self._where}: 'name' is '{name}'; expected letters, digits, '.', '_' and '-'")
        return name

    def _choice(self, fields: Fields, key: str, choices: Sequence[str]) -> str | None:
        value = self._take(fields, key, str)
        if value is not None and value not in choices:
            self._problems.add(f"{self._where}: '{key}' is '{value}'; {suggest(value, choices)}")
        return value

    def _model(self, fields: Fields, key: str) -> ModelReference | None:
        with self._problems.gathered():
            value = fields.take(key, object, None)
            return None if value is None else parse_model(value, f"{fields.where}: '{key}'")
        return None

    def _list(self, fields: Fields, key: str) -> list[Any]:
        found = self._take(fields, key, list)
        if found is not None and not found:
            self._problems.add(f"{fields.where}: '{key}' is empty; expected at least one entry")
        return found or []

    def _take(self, fields: Fields, key: str, kind: type[T]) -> T | None:
        with self._problems.gathered():
            return fields.take(key, kind, None)
        return None


def _parameters(fields: Fields, where: str) -> dict[Any, Any]:
    body = dict(fields.take("parameters", dict, None) or {})
    # mergekit takes it for every method; it says how masks are stored there, and changes no number.
    checked(body.pop("int8_mask", False), bool, f"{where}: parameters: 'int8_mask'")
    return body


def _layer_range(value: list[Any], where: str) -> tuple[int, int]:
    numbers = [checked(entry, int, where) for entry in value]
    if len(numbers) != 2 or not 0 <= numbers[0] < numbers[1]:
        raise InvalidSpec(f"{where}: expected [start, end] with 0 <= start < end, got {describe(value)}")
    return numbers[0], numbers[1]


def _tokenizer_options(entry: object, where: str) -> TokenizerOptions:
    problems = Problems()
    fields = Fields(entry, where)
    source = _tokenizer_source(fields.take("source", object, "union"), f"{where}: 'source'")
    rules = fields.take("tokens", dict, None) or {}
    multiple = fields.take("pad_to_multiple_of", int, None)
    fields.finish()
    tokens: dict[str, TokenRule] = {}
    for token, rule in rules.items():
        with problems.gathered():
            tokens[checked(token, str, f"{where}: tokens")] = _token_rule(rule, f"{where}: tokens: {token}")
    if multiple is not None and multiple < 1:
        problems.add(f"{where}: 'pad_to_multiple_of' is {multiple}; expected at least 1")
    problems.raise_any()
    return TokenizerOptions(source, tokens, multiple)


def _tokenizer_source(value: object, where: str) -> str | ModelReference:
    if isinstance(value, str) and value in TOKENIZER_SOURCES:
        return value
    return parse_model(value.removeprefix("model:") if isinstance(value, str) else value, where)


def _token_rule(entry: object, where: str) -> TokenRule:
    fields = Fields(entry, where)
    source = fields.take("source", object, None)
    force = fields.take("force", bool, False)
    fields.finish()
    if source is None:
        return TokenRule(None, force)
    if isinstance(source, Mapping) and "kind" in source:
        return TokenRule(_token_kind(Fields(source, f"{where}: 'source'")), force)
    return TokenRule(parse_model(source, f"{where}: 'source'"), force)


def _token_kind(fields: Fields) -> Zero | TokenOf:
    kind = fields.choose("kind", ("zero", "model_token"), "zero")
    if kind == "zero":
        fields.finish()
        return Zero()
    model = parse_model(fields.take("model", object), f"{fields.where}: 'model'")
    found = TokenOf(model, fields.take("token", str, None), fields.take("token_id", int, None))
    fields.finish()
    if (found.token is None) == (found.token_id is None):
        raise InvalidSpec(f"{fields.where}: expected either 'token' or 'token_id'")
    if found.token_id is not None and found.token_id < 0:
        raise InvalidSpec(f"{fields.where}: 'token_id' is {found.token_id}; expected at least 0")
    return found
