import math

from hypothesis import given
from hypothesis import strategies as st

from ensemerge.merge.blocks import BLOCK_ELEMENTS, Cut
from ensemerge.merge.method import Grain

shapes = st.lists(st.integers(1, 700), min_size=0, max_size=3).map(tuple)


@given(shapes, st.sampled_from(list(Grain)))
def test_blocks_cover_a_tensor_without_gap_or_overlap(shape: tuple[int, ...], grain: Grain) -> None:
    cut, end = Cut(shape, grain), 0
    for start, stop in cut.spans():
        for stretch in cut.stretches(start, stop):
            assert stretch.start == end
            assert math.prod(stretch.shape) == stretch.stop - stretch.start
            end = stretch.stop
    assert end == math.prod(shape)


def test_each_grain_keeps_together_what_must_not_be_split() -> None:
    shape = (400, 3, 500)
    seen = {grain: next(Cut(shape, grain).stretches(*next(Cut(shape, grain).spans()))).shape for grain in Grain}
    assert seen == {
        Grain.ELEMENT: (BLOCK_ELEMENTS,),
        Grain.ROW: (BLOCK_ELEMENTS // 500, 500),
        Grain.FILTER: (BLOCK_ELEMENTS // 1500, 1500),
        Grain.TENSOR: shape,
    }


def test_a_row_longer_than_a_block_is_a_block() -> None:
    (stretch,) = Cut((1, BLOCK_ELEMENTS * 3), Grain.ROW).stretches(0, BLOCK_ELEMENTS * 3)
    assert stretch.shape == (1, BLOCK_ELEMENTS * 3)


def test_scalars_and_vectors_are_one_row() -> None:
    for grain in (Grain.ROW, Grain.FILTER):
        assert [s.shape for s in Cut((), grain).stretches(0, 1)] == [(1, 1)]
        assert [s.shape for s in Cut((7,), grain).stretches(0, 7)] == [(1, 7)]
