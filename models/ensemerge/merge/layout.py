"""Which tensors of which models make each tensor of the merged model, and with what parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ensemerge.errors import InvalidSpec
from ensemerge.merge.methods.table import METHODS, REQUIRED, Base, MethodEntry, Parameter
from ensemerge.merge.naming import (
    LayerName,
    ModelNames,
    comes_early,
    config_value,
    is_head,
    layer_counts,
    layer_of,
    prefix_map,
    tied_embedding,
)
from ensemerge.merge.parameters import Settings, find
from ensemerge.merge.problems import Problems, few
from ensemerge.merge.recipe import Module, Recipe, Slice, Source
from ensemerge.merge.references import ModelReference

COPY = "passthrough"


@dataclass(frozen=True)
class Contribution:
    """One tensor of one model: `model` as the recipe names it, `tensor` as that model's file names it."""

    model: str
    tensor: str
    parameters: Mapping[str, Any]  # the method's per-model parameters, resolved for this tensor; empty for the origin


@dataclass(frozen=True)
class TensorRecipe:
    """One tensor of the merged model."""

    name: str
    method: str
    contributions: tuple[Contribution, ...]  # the base among them only where it is one of the models
    origin: Contribution | None  # the base, where the method measures task vectors from it
    shared: Mapping[str, Any]  # the method's other parameters, resolved for this tensor

    @property
    def inputs(self) -> tuple[Contribution, ...]:
        """All tensors that go into this one, the origin last."""
        return self.contributions if self.origin is None else (*self.contributions, self.origin)


@dataclass(frozen=True)
class Layout:
    """The merged model as data.

    `ties`: names that are another's tensor, `{name: name in tensors}`. `layers`: where layers were chosen, for each
    family (`model.layers`) the layer of the donor, or else of the first source, from which each output layer comes.
    `untied`: the output has a head of its own though the donor's config ties it to the embedding.
    """

    tensors: tuple[TensorRecipe, ...]
    ties: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    untied: bool = False
    notes: tuple[str, ...] = ()


def expand(recipe: Recipe, models: Mapping[str, ModelNames], methods: Mapping[str, MethodEntry] = METHODS) -> Layout:
    """Every tensor of the merged model, from names alone.

    `models` holds each of `recipe.references()` by its text. Raises InvalidSpec with a line for each problem.
    """
    expansion = _Expansion(recipe, models, methods[recipe.method], methods)
    return expansion.layout()


@dataclass(frozen=True)
class _Roles:
    """What the sources of a slice are to the method."""

    models: tuple[Source, ...]
    origin: Source | None

    @property
    def all(self) -> tuple[Source, ...]:
        return self.models if self.origin is None else (*self.models, self.origin)


@dataclass(frozen=True)
class _Stretch:
    """Tensors that share roles and levels of parameters, and where each source has them."""

    roles: _Roles
    levels: tuple[Settings, ...]  # slice, module, recipe, defaults
    where: str

    def own_name(self, source: Source, canonical: str) -> str:
        """A layer of the first source corresponds to the layer as far into the range of another."""
        layer = None if source.layer_range is None else layer_of(canonical)
        if layer is None or source.layer_range is None:
            return canonical
        first = self.roles.all[0].layer_range
        assert first is not None  # in a slice every source has a range
        return layer.at(layer.index - first[0] + source.layer_range[0])


class _Expansion:
    """One recipe being expanded: what was found wrong, what is missing, what is worth telling."""

    def __init__(
        self,
        recipe: Recipe,
        models: Mapping[str, ModelNames],
        entry: MethodEntry,
        methods: Mapping[str, MethodEntry],
    ) -> None:
        self._recipe = recipe
        self._models = models
        self._entry = entry
        self._methods = methods
        self._problems = Problems()
        self._notes: list[str] = []
        self._missing: dict[str, dict[str, None]] = {}
        self._unset: dict[tuple[str, str], list[str]] = {}
        self._layers: dict[str, tuple[int, ...]] = {}
        self._own = self._canonical_names()

    def layout(self) -> Layout:
        self._check_architectures()
        tensors: list[TensorRecipe] = []
        for where, part, names in self._parts():
            with self._problems.gathered():
                tensors += self._of_slices(where, part, names) if part.slices else self._of_models(where, part, names)
        self._report()
        self._problems.raise_any()
        ties = _ties(tensors, self._models, self._models[str(self._recipe.donor)])
        kept = tuple(tensor for tensor in tensors if tensor.name not in ties)
        if not kept:
            raise InvalidSpec("no tensor is left to merge; expected tensors of the same names in all models")
        return Layout(kept, ties, self._layers, self._unties(kept), tuple(self._notes))

    # Names: each model's own by the donor's.

    def _canonical_names(self) -> dict[str, dict[str, str]]:
        donor = str(self._recipe.donor)
        reference = self._usable_names(donor)
        own = {donor: {name: name for name in reference}}
        for reference_to in map(str, self._recipe.references()):
            if reference_to not in own:
                own[reference_to] = self._aligned(reference_to, reference)
        heads = dict.fromkeys(name for names in own.values() for name in names if is_head(name))
        for model, names in own.items():
            for head in (head for head in heads if head not in names):
                embedding = tied_embedding(self._models[model], head)
                if embedding is not None:
                    names[head] = embedding
                    self._notes.append(f"{model} ties {head}: its {embedding} stands in")
        return own

    def _usable_names(self, model: str) -> list[str]:
        """A head in the file of a model whose config ties it is never loaded: it is left out."""
        found = self._models[model]
        if config_value(found.config, "tie_word_embeddings") is not True:
            return list(found.names)
        ignored = [name for name in found.names if is_head(name) and name not in found.ties]
        usable = [name for name in ignored if tied_embedding(found, name) is not None]
        if usable:
            self._notes.append(f"{model}: {few(usable)} is left out, config.json ties it to the embedding")
        return [name for name in found.names if name not in usable]

    def _aligned(self, model: str, reference: Sequence[str]) -> dict[str, str]:
        names = self._usable_names(model)
        mapping = prefix_map(names, reference)
        if mapping is None:
            return {name: name for name in names}
        new, old = next(pair for pair in mapping.items() if pair[0] != pair[1])
        self._notes.append(f"{model}: names differ by a prefix alone; {old} is taken as {new}")
        return mapping

    # Parts: the whole, or the modules.

    def _parts(self) -> Iterable[tuple[str, Module, list[str]]]:
        names = list(dict.fromkeys(name for names in self._own.values() for name in names))
        if not self._recipe.modules:
            yield "slices" if self._recipe.slices else "models", Module(self._recipe.models, self._recipe.slices), names
            return
        owned = self._by_module(names)
        for module, part in self._recipe.modules.items():
            yield f"modules: {module}", part, owned[module]

    def _by_module(self, names: Sequence[str]) -> dict[str, list[str]]:
        owned: dict[str, list[str]] = {module: [] for module in self._recipe.modules}
        lost: list[str] = []
        for name in names:
            fitting = [module for module in owned if name.startswith((f"{module}.", f"model.{module}."))]
            module = max(fitting, key=len, default="default")
            owned.get(module, lost).append(name)
        prefixes = ", ".join(dict.fromkeys(_leading(name) for name in names))
        if lost:
            self._problems.add(
                f"modules: {len(lost)} tensors belong to none, such as {lost[0]}; expected each to begin with the name "
                f"of a module, or a module 'default' for what is left; the names begin with: {prefixes}"
            )
        for module in (module for module, own in owned.items() if not own):
            self._problems.add(f"modules: no tensor begins with '{module}'; the names begin with: {prefixes}")
        return owned

    # Models: all tensors.

    def _of_models(self, where: str, part: Module, names: Sequence[str]) -> list[TensorRecipe]:
        roles = self._roles(self._with_base(part.models), self._recipe.base, where)
        self._check_twice(roles, where)
        stretch = _Stretch(roles, (part.parameters, *self._farthest()), where)
        counts = layer_counts(names)
        return self._tensors((stretch, name, name, _depth(name, counts)) for name in names)

    def _with_base(self, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        """The base is one of the models, named or not, except where a method has no use for it."""
        base = self._recipe.base
        unused = self._entry.base is Base.DONOR and self._recipe.compat is None
        if base is None or unused or any(source.model == base for source in sources):
            return sources
        return (*sources, Source(base))

    def _check_twice(self, roles: _Roles, where: str) -> None:
        named = [str(source.model) for source in roles.all]
        twice = {name for name in named if named.count(name) > 1}
        if twice:
            raise InvalidSpec(f"{where}: {', '.join(sorted(twice))} is named twice; expected each model once")

    # Slices: chosen layers.

    def _of_slices(self, where: str, part: Module, names: Sequence[str]) -> list[TensorRecipe]:
        family = self._only_family(where, part, names)
        stretches = [self._stretch(where, part, piece, i) for i, piece in enumerate(part.slices)]
        loose = [name for name in self._used(stretches, names) if layer_of(name) is None]
        early = [name for name in loose if comes_early(name)]
        late = [name for name in loose if not comes_early(name)]
        if late and stretches[0].roles != stretches[-1].roles:
            self._notes.append(f"{where}: {few(early)} from the first slice, {few(late)} from the last")
        wanted = [(stretches[0], name, name, 0.0) for name in early]
        wanted += self._layer_tensors(family, part.slices, stretches, where)
        wanted += [(stretches[-1], name, name, 0.0) for name in late]
        return self._tensors(wanted)

    def _only_family(self, where: str, part: Module, names: Sequence[str]) -> str:
        families = layer_counts(names)
        if len(families) == 1:
            return next(iter(families))
        if not families:
            raise InvalidSpec(f"{where}: no numbered layers among the names, such as {few(list(names))}; use 'models'")
        found = ", ".join(f"{family} ({count})" for family, count in families.items())
        raise InvalidSpec(
            f"{where}: the names have several families of layers, and a layer_range cannot tell which it means: "
            f"{found}; put each under `modules`, by the prefix of its names"
        )

    def _stretch(self, where: str, part: Module, piece: Slice, index: int) -> _Stretch:
        place = f"{where}[{index}]" if where == "slices" else f"{where}: slices[{index}]"
        chosen = [(str(source.model), source.layer_range) for source in piece.sources]
        if len(set(chosen)) < len(chosen):
            raise InvalidSpec(f"{place}: the same layers of one model stand twice; expected each source once")
        roles = self._roles(piece.sources, piece.base or self._recipe.base, place)
        return _Stretch(roles, (piece.parameters, part.parameters, *self._farthest()), place)

    def _used(self, stretches: Sequence[_Stretch], names: Sequence[str]) -> list[str]:
        used = {str(source.model) for stretch in stretches for source in stretch.roles.all}
        return [name for name in names if any(name in self._own[model] for model in used)]

    def _layer_tensors(
        self, family: str, slices: Sequence[Slice], stretches: Sequence[_Stretch], where: str
    ) -> list[tuple[_Stretch, str, str, float]]:
        found: list[tuple[_Stretch, str, str, float]] = []
        picks: list[int] = []
        rests = self._rests(family)
        for piece, stretch in zip(slices, stretches, strict=True):
            self._check_range(stretch, family)
            start, stop = stretch.roles.all[0].layer_range or (0, 0)
            for offset in range(stop - start):
                t = offset / (stop - start - 1) if stop - start > 1 else 1.0
                for rest in self._rests_at(stretch, rests, offset):
                    layer = LayerName(family, start + offset, rest)
                    found.append((stretch, layer.at(len(picks)), layer.at(layer.index), t))
                picks.append(self._pick(piece) + offset)
        self._layers[family] = tuple(picks)
        return found

    def _rests(self, family: str) -> dict[tuple[str, int], list[str]]:
        """For each model and layer the names within the layer."""
        rests: dict[tuple[str, int], list[str]] = {}
        for model, names in self._own.items():
            for layer in filter(None, map(layer_of, names)):
                if layer.family == family:
                    rests.setdefault((model, layer.index), []).append(layer.rest)
        return rests

    def _rests_at(self, stretch: _Stretch, rests: Mapping[tuple[str, int], list[str]], offset: int) -> Iterable[str]:
        found: dict[str, None] = {}
        for source in stretch.roles.all:
            start = (source.layer_range or (0, 0))[0]
            found.update(dict.fromkeys(rests.get((str(source.model), start + offset), [])))
        return found

    def _check_range(self, stretch: _Stretch, family: str) -> None:
        for source in stretch.roles.all:
            count = layer_counts(self._own[str(source.model)]).get(family, 0)
            start, stop = source.layer_range or (0, 0)
            if stop > count:
                self._problems.add(
                    f"{stretch.where}: layer_range [{start}, {stop}] of {source.model} goes beyond its {count} layers "
                    f"({family})"
                )

    def _pick(self, piece: Slice) -> int:
        """Where a slice begins in the donor, whose config describes the layers; else in its first source."""
        ranges = {source.model: source.layer_range or (0, 0) for source in reversed(piece.sources)}
        return ranges.get(self._recipe.donor, ranges[piece.sources[0].model])[0]

    # Roles and counts.

    def _roles(self, sources: Sequence[Source], base: ModelReference | None, where: str) -> _Roles:
        bases = [source for source in sources if base is not None and source.model == base]
        others = [source for source in sources if source not in bases]
        kind = self._entry.base
        if kind is Base.ORIGIN and base is None:
            raise InvalidSpec(f"{where}: {self._recipe.method} needs a base; state `base_model`")
        if kind is not Base.DONOR and base is not None and len(bases) != 1:
            raise InvalidSpec(
                f"{where}: {self._recipe.method} measures from the base {base}; expected it once among the sources, "
                f"got it {len(bases)} times"
            )
        if kind is Base.DONOR or base is None:
            roles = _Roles(tuple(sources), None)
        elif kind is Base.FIRST:
            roles = _Roles((*bases, *others), None)
        else:
            roles = _Roles(tuple(others), bases[0])
        self._check_count(roles, where)
        return roles

    def _check_count(self, roles: _Roles, where: str) -> None:
        count, least, most = len(roles.models), self._entry.least, self._entry.most
        if count >= least and (most is None or count <= most):
            return
        expected = f"exactly {least}" if least == most else f"at least {least}" if count < least else f"at most {most}"
        beside = " beside the base" if roles.origin is not None else ""
        named = ", ".join(str(source.model) for source in roles.models) or "none"
        raise InvalidSpec(f"{where}: {self._recipe.method} needs {expected} models{beside}, got {count}: {named}")

    # Tensors.

    def _tensors(self, wanted: Iterable[tuple[_Stretch, str, str, float]]) -> list[TensorRecipe]:
        found = [self._tensor(*one) for one in wanted]
        return [tensor for tensor in found if tensor is not None]

    def _tensor(self, stretch: _Stretch, name: str, canonical: str, t: float) -> TensorRecipe | None:
        own = {}
        lacking = []
        for i, source in enumerate(stretch.roles.all):
            wanted = stretch.own_name(source, canonical)
            tensor = self._own[str(source.model)].get(wanted)
            if tensor is None:
                lacking.append((str(source.model), wanted))
            else:
                own[i] = tensor
        if lacking:
            return self._incomplete(stretch, name, own, lacking, t)
        return self._merged(stretch, name, own, t)

    def _incomplete(
        self, stretch: _Stretch, name: str, own: Mapping[int, str], lacking: Sequence[tuple[str, str]], t: float
    ) -> TensorRecipe | None:
        """A tensor that not all sources have: an error, left out, or made of those that have it."""
        if not own or self._recipe.tensors == "intersection":
            return None
        if self._recipe.tensors == "all":
            for model, wanted in lacking:
                self._missing.setdefault(model, {})[wanted] = None
            return None
        if len(own) == 1:
            (i, tensor), *_ = own.items()
            return self._copied(name, str(stretch.roles.all[i].model), tensor)
        has_origin = stretch.roles.origin is None or len(stretch.roles.models) in own
        models = len([i for i in own if i < len(stretch.roles.models)])
        if not has_origin or models < self._entry.least:
            self._problems.add(
                f"{name}: {self._recipe.method} cannot merge it, {', '.join(model for model, _ in lacking)} lacks it; "
                "use `tensors: intersection` to leave such tensors out"
            )
            return None
        return self._merged(stretch, name, own, t)

    def _copied(self, name: str, model: str, tensor: str) -> TensorRecipe:
        parameters = self._methods[COPY].parameters
        own = {parameter.name: parameter.default for parameter in parameters if parameter.per_model}
        shared = {parameter.name: parameter.default for parameter in parameters if not parameter.per_model}
        return TensorRecipe(name, COPY, (Contribution(model, tensor, own),), None, shared)

    def _merged(self, stretch: _Stretch, name: str, own: Mapping[int, str], t: float) -> TensorRecipe:
        contributions = []
        origin = None
        for i, tensor in own.items():
            source = stretch.roles.all[i]
            if i == len(stretch.roles.models):
                origin = Contribution(str(source.model), tensor, {})
            else:
                levels = (source.parameters, *stretch.levels)
                # mergekit's rule: what belongs to one model is filtered by the name in that model, at every level.
                values = self._values(levels, tensor, t, str(source.model), per_model=True)
                contributions.append(Contribution(str(source.model), tensor, values))
        shared = self._values(stretch.levels, name, t, "", per_model=False)
        return TensorRecipe(name, self._recipe.method, tuple(contributions), origin, shared)

    def _values(
        self, levels: Sequence[Settings], tensor: str, t: float, model: str, *, per_model: bool
    ) -> dict[str, Any]:
        values = {}
        for parameter in self._entry.parameters:
            if parameter.per_model is per_model:
                found = find(parameter.name, levels, tensor, t)
                if found is None and parameter.default is REQUIRED:
                    self._unset.setdefault((parameter.name, model), []).append(tensor)
                values[parameter.name] = parameter.default if found is None else self._typed(parameter, found, tensor)
        return values

    def _typed(self, parameter: Parameter, value: Any, tensor: str) -> Any:
        if parameter.kind is not int or isinstance(value, int):
            return value
        if not float(value).is_integer():
            self._problems.add(f"'{parameter.name}' is {value} for {tensor}; expected whole numbers along the gradient")
        return int(value)

    def _farthest(self) -> tuple[Settings, ...]:
        return self._recipe.parameters, self._recipe.defaults

    # What the person must know.

    def _check_architectures(self) -> None:
        found: dict[str, str] = {}
        for model in self._recipe.references():
            config = self._models[str(model)].config or {}
            stated = config.get("architectures") or [config.get("model_type")]
            name = model.override_architecture or (stated[0] if isinstance(stated, list) and stated else None)
            if isinstance(name, str):
                found[str(model)] = name
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{model} is {name}" for model, name in found.items())
            self._problems.add(
                f"the models are of different architectures: {listed}; if their tensors fit all the same, say "
                "{model: …, override_architecture: …} where a model is named"
            )

    def _report(self) -> None:
        for model, names in self._missing.items():
            self._problems.add(
                f"{model} lacks {len(names)} of the tensors: {few(list(names))}; expected the same in all models, or "
                "`tensors: intersection` to leave them out, `tensors: union` to take them from those that have them"
            )
        for (parameter, model), tensors in self._unset.items():
            of = f" of {model}" if model else ""
            self._problems.add(
                f"{self._recipe.method} needs '{parameter}'{of}; it is not set for {few(tensors, 2)}; add it to "
                "`parameters`"
            )

    def _unties(self, tensors: Sequence[TensorRecipe]) -> bool:
        donor = self._models[str(self._recipe.donor)]
        heads = [tensor.name for tensor in tensors if is_head(tensor.name)]
        return any(tied_embedding(donor, head) is not None for head in heads)


def _leading(name: str) -> str:
    """The prefix by which a module could be named."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "model" and "." in rest else first


def _depth(name: str, counts: Mapping[str, int]) -> float:
    """mergekit's rule: layers go from 0 to 1, a single layer stands at 1, all that is no layer at 0."""
    layer = layer_of(name)
    if layer is None:
        return 0.0
    count = counts[layer.family]
    return layer.index / (count - 1) if count > 1 else 1.0


def _ties(tensors: Sequence[TensorRecipe], models: Mapping[str, ModelNames], donor: ModelNames) -> dict[str, str]:
    """Tensors that are one and the same in every model that makes them: they stay one."""
    first: dict[tuple[tuple[str, str], ...], TensorRecipe] = {}
    ties: dict[str, str] = {}
    # Who loads the merged model goes by the donor's config: a head that it calls the model's own is looked for.
    own_head = config_value(donor.config, "tie_word_embeddings") is False
    for tensor in sorted(tensors, key=lambda tensor: is_head(tensor.name)):  # loaders look for the embedding
        key = tuple((one.model, models[one.model].ties.get(one.tensor, one.tensor)) for one in tensor.inputs)
        kept = first.setdefault(key, tensor)
        if kept is not tensor and _is_tie(tensor, kept) and not (own_head and is_head(tensor.name)):
            ties[tensor.name] = kept.name
    return ties


def _is_tie(tensor: TensorRecipe, kept: TensorRecipe) -> bool:
    """Of two tensors with equal inputs.

    A layer that is used twice has equal inputs under equal names: two tensors, not a tie. But a head for which a
    model's embedding stands in is tied in that model, as one that shares the embedding's memory is in another.
    """
    pairs = zip(tensor.inputs, kept.inputs, strict=True)
    return is_head(tensor.name) or all(one.tensor != other.tensor for one, other in pairs)
