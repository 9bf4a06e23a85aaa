"""Alignment as a preparation: a reader around a network's weights that gives them with their units in new places."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ensemerge.align.fusion import Network, Plans, carry
from ensemerge.align.zipping import Mixing, mixed
from ensemerge.graph.permute import moved
from ensemerge.graph.symmetry import Block, Permutations, Product, Symmetry
from ensemerge.weights.prepared import PermutedWeights
from ensemerge.weights.reader import TensorInfo, WeightReader, WrappedWeights, read

# What moving a whole tensor takes beside the result: the tensor, and a copy for each step.
COPIES = 3


class MovedWeights(WrappedWeights):
    """The weights of a network, moved by a group element, under the names that its symmetry has.

    Where every axis moves by itself a window is read as it is wanted. Where units within groups have orders of their
    own and lie on another axis than the groups (grouped convolutions), the whole tensor is read.
    """

    def __init__(self, inner: WeightReader, symmetry: Symmetry, permutations: Permutations) -> None:
        self._symmetry = symmetry
        self._permutations = permutations
        touched = {name for name in inner.names if name in symmetry.weights and self._is_touched(name)}
        maps = {name: axis_maps(symmetry, name, permutations) for name in touched}
        self._whole = {name for name, axes in maps.items() if axes is None}
        super().__init__(PermutedWeights(inner, {name: axes for name, axes in maps.items() if axes}))

    def _is_touched(self, name: str) -> bool:
        axes = self._symmetry.weights[name]
        return any(space in self._permutations for block in self._symmetry.blocks(axes) for space in block.spaces)

    @property
    def ties(self) -> Mapping[str, str]:
        return {new: old for new, old in self._inner.ties.items() if not {new, old} & self._whole}

    @property
    def resident_bytes(self) -> int:
        return self._inner.resident_bytes + sum(order.nbytes for order in self._permutations.values())

    def window(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self._whole:
            return self._inner.window(name, start, stop)
        # As bits, since numpy does not know all of torch's dtypes.
        bits = read(self._inner, name).view(_BITS[self.info(name).dtype.itemsize]).numpy()
        result = moved(self._symmetry, bits, self._symmetry.weights[name], self._permutations)
        return torch.from_numpy(result.reshape(-1)[start:stop]).view(self.info(name).dtype)

    def give_back(self, name: str, start: int, stop: int) -> None:
        if name not in self._whole:
            self._inner.give_back(name, start, stop)

    def window_bytes(self, name: str, elements: int) -> int:
        own = COPIES * self.info(name).nbytes if name in self._whole else 0
        return own + self._inner.window_bytes(name, elements)


class MixedWeights(WrappedWeights):
    """A network's share of a zip: the merged weights are the mean of all networks' shares.

    Whole tensors are read; they come in the dtype of the network.
    """

    def __init__(self, inner: WeightReader, symmetry: Symmetry, mixing: Mixing, networks: int) -> None:
        super().__init__(inner)
        self._symmetry = symmetry
        self._mixing = mixing
        self._networks = networks
        self._touched = {name for name in inner.names if name in symmetry.weights}

    @property
    def ties(self) -> Mapping[str, str]:
        return {new: old for new, old in self._inner.ties.items() if not {new, old} & self._touched}

    @property
    def resident_bytes(self) -> int:
        maps = (*self._mixing.averaged.values(), *self._mixing.copied.values())
        return self._inner.resident_bytes + sum(table.nbytes for table in maps)

    def window(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self._touched:
            return self._inner.window(name, start, stop)
        whole = read(self._inner, name).double().numpy()
        share = mixed(self._symmetry, name, whole, self._mixing, self._networks)
        return torch.from_numpy(share.reshape(-1)[start:stop]).to(self.info(name).dtype)

    def give_back(self, name: str, start: int, stop: int) -> None:
        if name not in self._touched:
            self._inner.give_back(name, start, stop)

    def window_bytes(self, name: str, elements: int) -> int:
        own = COPIES * 8 * self.info(name).numel if name in self._touched else 0
        return own + self._inner.window_bytes(name, elements)


class CarriedWeights(WrappedWeights):
    """A network's weights carried over to the units of another, in that one's shapes and under its names.

    Whole tensors are read; they come in the dtype of the network.
    """

    def __init__(self, inner: WeightReader, first: Symmetry, second: Symmetry, plans: Plans) -> None:
        super().__init__(inner)
        self._first = first
        self._second = second
        self._plans = plans

    @property
    def ties(self) -> Mapping[str, str]:
        return {new: old for new, old in self._inner.ties.items() if new not in self._first.weights}

    @property
    def resident_bytes(self) -> int:
        return self._inner.resident_bytes + sum(plan.nbytes for plan in self._plans.values())

    def info(self, name: str) -> TensorInfo:
        info = self._inner.info(name)
        if name not in self._first.weights:
            return info
        shape = [sum(self._first.size(factors) for factors in axis) for axis in self._first.weights[name]]
        return TensorInfo(tuple(shape), info.dtype)

    def window(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self._first.weights:
            return self._inner.window(name, start, stop)
        whole = Network(self._second, {name: read(self._inner, name).double().numpy()})
        carried = carry(self._first, whole, name, self._plans)
        return torch.from_numpy(carried.reshape(-1)[start:stop]).to(self.info(name).dtype)

    def give_back(self, name: str, start: int, stop: int) -> None:
        if name not in self._first.weights:
            self._inner.give_back(name, start, stop)

    def window_bytes(self, name: str, elements: int) -> int:
        if name not in self._first.weights:
            return self._inner.window_bytes(name, elements)
        own, theirs = self.info(name), self._inner.info(name)
        return COPIES * 8 * max(own.numel, theirs.numel) + self._inner.window_bytes(name, theirs.numel)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def axis_maps(symmetry: Symmetry, name: str, permutations: Permutations) -> dict[int, np.ndarray] | None:
    """For each axis of a weight that moves, where each index comes from; None where axes do not move by themselves."""
    maps = {}
    for number, axis in enumerate(symmetry.weights[name]):
        parts, start = [], 0
        for factors in axis:
            if not _stands_alone(symmetry, factors, permutations):
                return None
            size = symmetry.size(factors)
            parts.append(start + moved(symmetry, np.arange(size), [(factors,)], permutations))
            start += size
        index = np.concatenate(parts)
        if not np.array_equal(index, np.arange(len(index))):
            maps[number] = index
    return maps


def _stands_alone(symmetry: Symmetry, factors: Product, permutations: Permutations) -> bool:
    """Whether all within which the factors lie is on the same axis."""
    block = Block((slice(0, 0),), (factors,))
    return all(
        outer in block.spaces for name in factors if name in permutations for outer in symmetry.spaces[name].within
    )
