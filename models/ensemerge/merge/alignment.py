"""Bring the networks of a merge into one order before their weights meet, and prove that each is still itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from ensemerge.align.activations import Observed, correlate
from ensemerge.align.fusion import Network, fuse
from ensemerge.align.matching import Matching, Search, match_all, refuse_not_finite
from ensemerge.align.parting import head_orders
from ensemerge.align.prepare import CarriedWeights, MixedWeights, MovedWeights
from ensemerge.align.proof import permuted, prove_same
from ensemerge.align.similarity import (
    Balanced,
    Similarity,
    SortedWeights,
    Tables,
    WeightCorrelations,
    WeightProducts,
)
from ensemerge.align.zipping import Zip, ZipSettings, correlations_of, zip_networks, zippable
from ensemerge.errors import InvalidSpec
from ensemerge.graph.derive import derive_symmetry
from ensemerge.graph.files import named
from ensemerge.graph.heads import Head, with_heads
from ensemerge.graph.permute import Weights, move, random_permutations
from ensemerge.graph.run import Arrays, fixed_rows
from ensemerge.graph.statistics import statistics_of
from ensemerge.graph.surgery import held
from ensemerge.graph.symmetry import Permutations, Product
from ensemerge.graph.trace import inputs_that_run
from ensemerge.merge.alignment_spec import ACTIVATIONS, BOTH, TRANSPORT, WEIGHTS, ZIP, Alignment
from ensemerge.merge.onnx_forms import PairedModels
from ensemerge.merge.opened import OpenModel
from ensemerge.progress import Notify, silent
from ensemerge.repository import Check

# For each network and each axis of a trunk's output, for each unit of its head the number of the trunk's.
Orders = Mapping[str, Mapping[int, np.ndarray]]


@dataclass(frozen=True)
class Aligned:
    """The models of a merge in one order, what was proved of each, and how alike they were found.

    `exact` says whether each network still computes what it did: a zip does not keep that. `alpha` and `scores` are
    those of a search; `orders` say how each head reads the trunk, where the networks part.
    """

    models: Mapping[str, OpenModel]
    checks: tuple[Check, ...]
    similarity: float
    exact: bool
    alpha: float | None = None
    scores: Mapping[float, float] = field(default_factory=dict)
    orders: Orders = field(default_factory=dict)


# So many rows of data are proof enough that a network is still itself.
PROOF_ROWS = 16
# How good a merge of aligned networks would be: larger is better.
Score = Callable[["Aligned"], float]
ALPHAS = tuple(round(0.1 * step, 1) for step in range(11))


def align_models(
    paired: PairedModels,
    alignment: Alignment,
    feeds: Arrays | None = None,
    score: Score | None = None,
    notify: Notify = silent,
) -> Aligned:
    """Match the units of all models to those of the donor.

    `feeds` is unlabelled data, arrays `(rows, …)` by input name, which similarity by activations needs; `score` says
    how good a merge of aligned models would be, which the search for an `alpha` needs. Raises InvalidSpec without
    them, InvalidData where data or weights do not fit, CheckFailed where a network changes.
    """
    if len(paired.models) < 2:
        raise InvalidSpec(f"there is nothing to align {paired.donor} with; expected at least two models")
    if alignment.matching == TRANSPORT:
        return _transported(paired, alignment, feeds, notify)
    networks = _Networks(paired, feeds)
    make = networks.zipped if alignment.matching == ZIP else networks.aligned
    if alignment.by != BOTH or alignment.alpha is not None:
        return make(alignment, notify)
    if score is None:
        raise InvalidSpec("`alpha: auto` needs a merge to be judged: expected a `kind: merge` with calibration data")
    scores: dict[float, float] = {}
    for number, alpha in enumerate(ALPHAS):
        scores[alpha] = score(make(replace(alignment, alpha=alpha), notify))
        notify("search alpha", number + 1, len(ALPHAS))
    best = max(scores, key=lambda alpha: scores[alpha])
    return replace(make(replace(alignment, alpha=best), notify), alpha=best, scores=scores)


def _transported(paired: PairedModels, alignment: Alignment, feeds: Arrays | None, notify: Notify) -> Aligned:
    """Every network's units carried over to the donor's, which may be more or fewer."""
    if paired.heads:
        raise InvalidSpec("a transport has no order in which a head could read a trunk; leave out `trunk`")
    networks = {name: _network(paired, name, feeds) for name in paired.models}
    first = networks[paired.donor]
    models, others = dict(paired.models), [name for name in paired.models if name != paired.donor]
    for number, name in enumerate(others):
        plans = fuse(first, networks[name], alignment.regularization)
        reader = CarriedWeights(models[name].reader, first.symmetry, networks[name].symmetry, plans)
        models[name] = replace(models[name], reader=reader)
        notify("carry units over", number + 1, len(others))
    return Aligned(models, (), 0.0, exact=False)


def _network(paired: PairedModels, name: str, feeds: Arrays | None) -> Network:
    """A model's weights and its own symmetry, under the donor's names."""
    own = {named(theirs): named(ours) for ours, theirs in paired.pairings[name].items()}
    found = derive_symmetry(paired.graphs[name], feeds)
    symmetry = replace(
        found,
        weights={own[weight]: axes for weight, axes in found.weights.items() if weight in own},
        inputs=frozenset((own[weight], axis) for weight, axis in found.inputs if weight in own),
    )
    tensors = _tensors(paired, name)
    refuse_not_finite(tensors)
    return Network(symmetry, {weight: tensors[weight] for weight in symmetry.weights})


class _Networks:
    """The networks as alignment sees them: one symmetry, and the weights of all under the donor's names."""

    def __init__(self, paired: PairedModels, feeds: Arrays | None) -> None:
        self._paired = paired
        self._feeds = feeds
        self._names = [paired.donor, *(name for name in paired.models if name != paired.donor)]
        graph = paired.graphs[paired.donor]
        tensors = {name: _tensors(paired, name) for name in self._names}
        fixed = _equal_tables(list(tensors.values()))
        self.symmetry = derive_symmetry(graph, feeds, fixed, is_trunk=bool(paired.heads))
        self._measured: dict[bool, dict[tuple[int, int], Tables]] = {}
        self._weights = [{weight: tensors[name][weight] for weight in self.symmetry.weights} for name in self._names]

    def aligned(self, alignment: Alignment, notify: Notify) -> Aligned:
        """Every network moved into the donor's order, and proved to be itself."""
        matchings = self._matchings(alignment, notify)
        models = dict(self._paired.models)
        for name, matching in matchings.items():
            reader = MovedWeights(models[name].reader, self.symmetry, matching.permutations)
            models[name] = replace(models[name], reader=reader)
        checks = [self._proof(name, matching.permutations) for name, matching in matchings.items()]
        similarity = float(np.mean([matching.similarity for matching in matchings.values()]))
        orders = {name: self._orders(matching.permutations, {}) for name, matching in matchings.items()}
        return Aligned(models, tuple(checks), similarity, exact=True, orders=orders)

    def zipped(self, alignment: Alignment, notify: Notify) -> Aligned:
        """Every network's share of a zip. What is proved is the symmetry: a random element of the group on each.

        Spaces that a zip leaves out are aligned before.
        """
        left = self._left_by_zip()
        matchings = self._matchings(alignment, notify) if left else {}
        kept = {
            name: {space: order for space, order in matching.permutations.items() if space in left}
            for name, matching in matchings.items()
        }
        readers = {
            name: MovedWeights(self._paired.models[name].reader, self.symmetry, kept.get(name, {}))
            for name in self._names
        }
        found = self._zip(alignment, kept, notify)
        models = {
            name: replace(
                self._paired.models[name],
                reader=MixedWeights(readers[name], self.symmetry, mixing, len(self._names)),
            )
            for name, mixing in zip(self._names, found.mixings, strict=True)
        }
        checks = [self._proof(name, self._random(number)) for number, name in enumerate(self._names)]
        orders = {
            name: self._orders(kept.get(name, {}), mixing.copied)
            for name, mixing in zip(self._names, found.mixings, strict=True)
        }
        return Aligned(models, tuple(checks), found.similarity, exact=False, orders=orders)

    def _left_by_zip(self) -> set[str]:
        zipped = {space.name for family in zippable(self.symmetry) for space in family}
        return {space.name for space in self.symmetry.free} - zipped

    def _zip(self, alignment: Alignment, kept: Mapping[str, Permutations], notify: Notify) -> Zip:
        tables = self._tables(alignment.by, notify, within=True)
        networks = [
            move(self.symmetry, weights, kept.get(name, {}))
            for name, weights in zip(self._names, self._weights, strict=True)
        ]
        settings = ZipSettings(alignment.damping, alignment.budget, _share(alignment))
        correlations = correlations_of(self.symmetry, tables, len(self._names))
        ignored = statistics_of(self._paired.graphs[self._paired.donor])
        return zip_networks(self.symmetry, networks, correlations, settings, ignored)

    def _random(self, number: int) -> Permutations:
        return random_permutations(self.symmetry, np.random.default_rng(number))

    def _matchings(self, alignment: Alignment, notify: Notify) -> dict[str, Matching]:
        """How each network but the donor goes into the donor's order."""
        ignored = statistics_of(self._paired.graphs[self._paired.donor])
        search = Search(random_starts=alignment.starts)
        similarity = self._similarity(alignment, ignored, notify)
        found = match_all(self.symmetry, self._weights, similarity, SortedWeights(ignored), search, notify)
        return dict(zip(self._names[1:], found[1:], strict=True))

    def _proof(self, name: str, permutations: Permutations) -> Check:
        """The network by itself, moved, against the network as it was."""
        graph, pairs = self._paired.graphs[name], self._paired.pairings[name]
        own = {named(ours): named(theirs) for ours, theirs in pairs.items()}
        symmetry = replace(self.symmetry, weights={own[w]: axes for w, axes in self.symmetry.weights.items()})
        probes = self._probes(graph)
        moved_graph = permuted(graph, symmetry, permutations)
        if self._paired.heads:
            head = Head(name, self._paired.heads[name])
            moved_graph = with_heads(moved_graph, [replace(head, orders=self._orders(permutations, {}))])
            graph = with_heads(graph, [head])
        return prove_same(graph, moved_graph, probes, f"aligned:{name}")

    def _orders(self, permutations: Permutations, copied: Mapping[Product, np.ndarray]) -> dict[int, np.ndarray]:
        """How a network's own head reads the output of a trunk whose units were moved, and then merged."""
        if not self._paired.heads:
            return {}
        (output,) = self._paired.graphs[self._paired.donor].graph.outputs
        return head_orders(self.symmetry, self.symmetry.values[named(output)], permutations, copied)

    def _similarity(
        self, alignment: Alignment, ignored: frozenset[str], notify: Notify
    ) -> Callable[[int, int], Similarity]:
        if alignment.by == WEIGHTS:
            return lambda i, j: WeightProducts(ignored)
        tables = self._tables(alignment.by, notify, within=False)
        share = _share(alignment)
        if share == 0:
            return lambda i, j: tables[i, j]
        return lambda i, j: Balanced(share, WeightCorrelations(ignored), tables[i, j])

    def _tables(self, by: str, notify: Notify, *, within: bool) -> dict[tuple[int, int], Tables]:
        """Similarities by activations, of pairs of networks, or of networks with themselves as well."""
        if self._feeds is None:
            what = "a zip" if within else f"similarity by {by}"
            raise InvalidSpec(
                f"{what} needs data: expected `calibration: {{data: FILE.npz}}`, or `matching: align` by weights"
            )
        if within not in self._measured:
            count = len(self._names)
            pairs = [(i, j) for i in range(count) for j in range(i if within else i + 1, count)]
            observed = [self._observed(name) for name in self._names]
            tables = correlate(self.symmetry, observed, self._feeds, pairs, notify)
            self._measured[within] = {**{(j, i): table.transposed for (i, j), table in tables.items()}, **tables}
        return self._measured[within]

    def _observed(self, name: str) -> Observed:
        pairs = self._paired.pairings[name]
        return Observed(self._paired.graphs[name], {named(ours): named(theirs) for ours, theirs in pairs.items()})

    def _probes(self, graph: ir.Model) -> list[Arrays]:
        """Some rows of the data, and noise of their shape; made-up inputs where there are no data."""
        if self._feeds is None:
            return [inputs_that_run(graph)]
        rows = fixed_rows([list(value.shape or ()) for value in graph.graph.inputs]) or PROOF_ROWS
        few = {name: array[:rows] for name, array in self._feeds.items()}
        generator = np.random.default_rng(1)
        noise = {
            name: generator.standard_normal(array.shape).astype(array.dtype) if array.dtype.kind == "f" else array
            for name, array in few.items()
        }
        return [few, noise]


def _share(alignment: Alignment) -> float:
    """Of similarity by weights."""
    return {WEIGHTS: 1.0, ACTIVATIONS: 0.0}.get(alignment.by, alignment.alpha or 0.0)


def _tensors(paired: PairedModels, name: str) -> Weights:
    """All tensors that a model's graph holds, under the donor's names."""
    tensors = {}
    for ours, theirs in paired.pairings[name].items():
        tensor = held(theirs)
        if tensor is not None and tensor.dtype.is_floating_point():
            tensors[named(ours)] = tensor.numpy()
    return tensors


def _equal_tables(networks: Sequence[Weights]) -> set[str]:
    """Tensors that all networks share, number by number, and that are not one number: tables, not learned apart."""
    first, *others = networks
    return {
        name
        for name, array in first.items()
        if array.size > 1
        and not (array == array.flat[0]).all()
        and all(np.array_equal(array, other[name]) for other in others)
    }
