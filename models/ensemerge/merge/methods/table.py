"""Every method by its name in a recipe: the parameters it takes, the models it needs, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from ensemerge.merge.alignment_spec import ALIGNING
from ensemerge.merge.draws import Draws
from ensemerge.merge.method import Method
from ensemerge.merge.methods import averaging, masks, selective, spherical, subspace
from ensemerge.merge.methods.arithmetic import TaskArithmetic
from ensemerge.merge.methods.averaging import WeightedSum, normalized
from ensemerge.merge.methods.consensus import AgreeingMean, AgreeingSum, Consensus, Sum
from ensemerge.merge.methods.sce import Sce, SelectAll, SelectVarying
from ensemerge.merge.methods.sparsify import (
    Band,
    Drop,
    DropByRank,
    KeepAll,
    Outliers,
    RescaledToL1,
    Sparsify,
    Trim,
    inverse,
    unscaled,
)
from ensemerge.merge.methods.stock import FilterStock, ModelStock

REQUIRED: Any = object()


class Base(Enum):
    """What `base_model` means to a method."""

    DONOR = "donor"  # gives configuration and tokenizer; merged only if it is among the models
    FIRST = "first"  # one of the models, and the first of them
    ORIGIN = "origin"  # θ_0, from which task vectors are measured; not itself one of the models
    OPTIONAL_ORIGIN = "optional origin"


@dataclass(frozen=True)
class Parameter:
    """A parameter of a recipe: one number or switch for the tensor, or one for each model."""

    name: str
    kind: type = float  # float, int or bool
    default: Any = REQUIRED
    per_model: bool = False
    low: float = float("-inf")  # the least and greatest value that has a meaning
    high: float = float("inf")


@dataclass(frozen=True)
class Settings:
    """The parameters of one tensor, resolved."""

    models: Sequence[Mapping[str, Any]]  # of each model, the base left out where it is the origin
    shared: Mapping[str, Any]
    draws: Draws

    @property
    def count(self) -> int:
        return len(self.models)

    def each(self, name: str) -> tuple[Any, ...]:
        """A per-model parameter of all models."""
        return tuple(model[name] for model in self.models)


@dataclass(frozen=True)
class MethodEntry:
    """A method of the table."""

    make: Callable[[Settings], Method]
    parameters: Sequence[Parameter]
    base: Base = Base.DONOR
    least: int = 1  # models, the base left out where it is the origin
    most: int | None = None
    # A method that makes one model for each task is made once for each: `make_for(settings, task)`.
    make_for: Callable[[Settings, int], Method] | None = None


WEIGHT = Parameter("weight", per_model=True)
DENSITY = Parameter("density", float, 1.0, per_model=True, low=0, high=1)
GAMMA = Parameter("gamma", float, 0.01, per_model=True, low=0, high=1)
EPSILON = Parameter("epsilon", float, 0.15, per_model=True, low=0, high=0.5)
LAMBDA = Parameter("lambda", float, 1.0)
RAM_EPSILON = Parameter("epsilon", float, 1e-5, low=0)


def task_vector_parameters(*more: Parameter, normalize: bool, rescale: bool) -> list[Parameter]:
    """What every refinement of task arithmetic takes."""
    switches = [Parameter("normalize", bool, normalize), Parameter("rescale", bool, rescale)]
    return [WEIGHT, DENSITY, LAMBDA, *switches, *more]


def task_arithmetic(
    sparsify: Callable[[Settings], Sparsify], consensus: Callable[[Settings], Consensus]
) -> Callable[[Settings], Method]:
    """How a method of the family is made from how its two steps are made."""
    return lambda settings: TaskArithmetic(
        sparsify(settings), consensus(settings), settings.shared["lambda"], settings.count
    )


def _linear(settings: Settings) -> Method:
    weights = settings.each("weight")
    return WeightedSum(normalized(weights) if settings.shared["normalize"] else weights)


def _passthrough(settings: Settings) -> Method:
    return WeightedSum(settings.each("scale"))


def _slerp(settings: Settings) -> Method:
    return spherical.SphericalSum(partial(spherical.slerp, t=settings.shared["t"]), settings.count)


def along(settings: Settings, rule: spherical.Rule) -> Method:
    """NuSLERP's three ways to cut a tensor into vectors: not at all, along axis 0, along the last axis."""
    if settings.shared["nuslerp_flatten"]:
        return spherical.SphericalSum(rule, settings.count)
    if settings.shared["nuslerp_row_wise"]:
        return spherical.ColumnSum(rule, settings.count)
    return spherical.RowSum(rule, settings.count)


def _nuslerp(settings: Settings) -> Method:
    return along(settings, partial(spherical.slerp, t=normalized(settings.each("weight"))[1]))


def sphere_weights(settings: Settings) -> Sequence[float]:
    weights = settings.each("weight")
    return normalized(weights) if settings.shared["normalize_weights"] else weights


def _multislerp(settings: Settings) -> Method:
    rule = partial(spherical.multislerp, weights=sphere_weights(settings), eps=settings.shared["eps"])
    return spherical.SphericalSum(rule, settings.count)


def _karcher(settings: Settings) -> Method:
    rule = partial(spherical.karcher, max_iter=settings.shared["max_iter"], tol=settings.shared["tol"])
    return spherical.SphericalSum(rule, settings.count)


def keep_all(_settings: Settings) -> Sparsify:
    return KeepAll()


def _trim(settings: Settings) -> Sparsify:
    densities = settings.each("density")
    return _rescaled(settings, Trim(densities) if min(densities) < 1 else KeepAll())


def _outliers(settings: Settings) -> Sparsify:
    return _rescaled(settings, Outliers(Band(settings.each("density"), settings.each("gamma"))))


def _rescaled(settings: Settings, step: Sparsify) -> Sparsify:
    return RescaledToL1(step) if settings.shared["rescale"] else step


def _drop(settings: Settings) -> Sparsify:
    return Drop(settings.each("density"), settings.draws, inverse if settings.shared["rescale"] else unscaled)


def _drop_by_rank(settings: Settings) -> Sparsify:
    compensate = inverse if settings.shared["rescale"] else unscaled
    return DropByRank(settings.each("density"), settings.each("epsilon"), settings.draws, compensate)


def _sum(settings: Settings) -> Consensus:
    weights = settings.each("weight")
    return Sum(normalized(weights) if settings.shared["normalize"] else weights)


def _elect(settings: Settings) -> Consensus:
    weights = settings.each("weight")
    return AgreeingMean(weights) if settings.shared["normalize"] else AgreeingSum(weights)


def _sce(settings: Settings) -> Method:
    top = settings.shared["select_topk"]
    # One model does not vary: there is nothing to select by.
    return Sce(SelectVarying(top) if top < 1 and settings.count > 1 else SelectAll(), settings.count)


def _model_stock(settings: Settings) -> Method:
    return FilterStock(settings.count) if settings.shared["filter_wise"] else ModelStock(settings.count)


def nearswap(settings: Settings) -> Method:
    return selective.NearSwap(settings.shared["t"])


def ram(settings: Settings) -> Method:
    return selective.Ram(settings.shared["epsilon"], settings.count)


def ramplus(settings: Settings) -> Method:
    shared = settings.shared
    return selective.RamPlus(selective.Amplification(shared["epsilon"], shared["r"], shared["alpha"]), settings.count)


def _tall_mask(settings: Settings, task: int) -> Method:
    return masks.TallMask(task, settings.each("weight"), settings.shared["lambda"])


def _subspace(merge: subspace.MergeMatrices) -> Callable[[Settings], Method]:
    return lambda settings: subspace.SubspaceMerge(merge, settings.shared["lambda"], settings.count)


def _iso_cts(settings: Settings) -> Method:
    return _subspace(partial(subspace.iso_cts, common=settings.shared["common"]))(settings)


def _knots(consensus: Callable[[Settings], Consensus]) -> Callable[[Settings], Method]:
    def make(settings: Settings) -> Method:
        inner = consensus(settings)
        merge = subspace.Knots(settings.each("density"), inner)
        return subspace.SubspaceMerge(merge, settings.shared["lambda"], settings.count, inner)

    return make


FLATTEN = [Parameter("nuslerp_flatten", bool, True), Parameter("nuslerp_row_wise", bool, False)]
SPHERE = [WEIGHT, Parameter("normalize_weights", bool, True), Parameter("eps", float, 1e-8, low=0)]
KARCHER = [Parameter("max_iter", int, 10, low=0, high=10_000), Parameter("tol", float, 1e-5, low=0)]
SCE = [Parameter("select_topk", float, 1.0, low=0, high=1)]
RAM_PLUS = [Parameter("r", float, 0.1, low=0), Parameter("alpha", float, 0.2, low=0), RAM_EPSILON]
BETA = Parameter("beta", float, low=0, high=1)
KNOTS = [WEIGHT, DENSITY, LAMBDA]

LINEAR = MethodEntry(_linear, [WEIGHT, Parameter("normalize", bool, True)])

METHODS: Mapping[str, MethodEntry] = {
    "linear": LINEAR,
    # Of networks whose units are brought into one order first.
    **dict.fromkeys(ALIGNING, LINEAR),
    "uniform_soup": MethodEntry(lambda s: WeightedSum(averaging.uniform(s.count)), []),
    "swa": MethodEntry(
        lambda s: WeightedSum(averaging.swa(s.count, s.shared["start"])), [Parameter("start", int, 0, low=0)]
    ),
    "ema": MethodEntry(lambda s: WeightedSum(averaging.ema(s.count, s.shared["beta"])), [BETA]),
    "lawa": MethodEntry(lambda s: WeightedSum(averaging.lawa(s.count, s.shared["k"])), [Parameter("k", int, low=1)]),
    "passthrough": MethodEntry(_passthrough, [Parameter("scale", float, 1.0, per_model=True)], most=1),
    "slerp": MethodEntry(_slerp, [Parameter("t")], Base.FIRST, least=2, most=2),
    "nuslerp": MethodEntry(_nuslerp, [WEIGHT, *FLATTEN], Base.OPTIONAL_ORIGIN, least=2, most=2),
    "multislerp": MethodEntry(_multislerp, SPHERE, Base.OPTIONAL_ORIGIN),
    "karcher": MethodEntry(_karcher, KARCHER),
    "task_arithmetic": MethodEntry(
        task_arithmetic(keep_all, _sum), task_vector_parameters(normalize=False, rescale=False), Base.ORIGIN
    ),
    "ties": MethodEntry(
        task_arithmetic(_trim, _elect), task_vector_parameters(normalize=True, rescale=False), Base.ORIGIN
    ),
    "dare_linear": MethodEntry(
        task_arithmetic(_drop, _sum), task_vector_parameters(normalize=False, rescale=True), Base.ORIGIN
    ),
    "dare_ties": MethodEntry(
        task_arithmetic(_drop, _elect), task_vector_parameters(normalize=False, rescale=True), Base.ORIGIN
    ),
    "della": MethodEntry(
        task_arithmetic(_drop_by_rank, _elect),
        task_vector_parameters(EPSILON, normalize=True, rescale=True),
        Base.ORIGIN,
    ),
    "della_linear": MethodEntry(
        task_arithmetic(_drop_by_rank, _sum),
        task_vector_parameters(EPSILON, normalize=False, rescale=True),
        Base.ORIGIN,
    ),
    "breadcrumbs": MethodEntry(
        task_arithmetic(_outliers, _sum), task_vector_parameters(GAMMA, normalize=False, rescale=False), Base.ORIGIN
    ),
    "breadcrumbs_ties": MethodEntry(
        task_arithmetic(_outliers, _elect), task_vector_parameters(GAMMA, normalize=False, rescale=False), Base.ORIGIN
    ),
    "sce": MethodEntry(_sce, SCE, Base.ORIGIN),
    "model_stock": MethodEntry(_model_stock, [Parameter("filter_wise", bool, False)], Base.ORIGIN, least=2),
    "nearswap": MethodEntry(nearswap, [Parameter("t", low=0)], Base.ORIGIN, most=1),
    "arcee_fusion": MethodEntry(lambda s: selective.ArceeFusion(), [], Base.ORIGIN, most=1),
    "ram": MethodEntry(ram, [RAM_EPSILON], Base.ORIGIN),
    "ramplus_tl": MethodEntry(ramplus, RAM_PLUS, Base.ORIGIN),
    "emr": MethodEntry(
        lambda s: masks.Unified(s.count), [], Base.ORIGIN, make_for=lambda s, task: masks.Emr(task, s.count)
    ),
    "tall_masks": MethodEntry(
        lambda s: TaskArithmetic(KeepAll(), Sum(s.each("weight")), 1.0, s.count),
        [Parameter("weight", float, 1.0, per_model=True), Parameter("lambda", float, 0.6, low=0)],
        Base.ORIGIN,
        make_for=_tall_mask,
    ),
    "tsv_m": MethodEntry(_subspace(subspace.tsv_m), [LAMBDA], Base.ORIGIN),
    "iso_c": MethodEntry(_subspace(subspace.iso_c), [LAMBDA], Base.ORIGIN),
    "iso_cts": MethodEntry(_iso_cts, [LAMBDA, Parameter("common", float, 0.8, low=0, high=1)], Base.ORIGIN),
    "knots_linear": MethodEntry(_knots(lambda s: Sum(s.each("weight"))), KNOTS, Base.ORIGIN),
    "knots_ties": MethodEntry(_knots(lambda s: AgreeingMean(s.each("weight"))), KNOTS, Base.ORIGIN),
}
