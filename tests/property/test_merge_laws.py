"""What must hold for every method of the table, or for all of a kind."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.merging import merge

from ensemerge.errors import InvalidSpec
from ensemerge.merge.methods.table import METHODS, Base

SHAPES = st.sampled_from([(), (1,), (7,), (3, 4), (4, 3), (1, 5), (5, 1), (2, 3, 2, 2)])
SEEDS = st.integers(0, 2**31)
CHOSEN = {"weight": 0.7, "t": 0.3, "density": 0.6, "epsilon": 0.1, "beta": 0.8, "k": 1}
# Methods that keep all of what the models agree on: nothing is dropped, and the weights of a mean sum to one.
MEANS: dict[str, dict[str, Any]] = {
    "linear": {}, "uniform_soup": {}, "swa": {}, "ema": {}, "lawa": {}, "passthrough": {}, "slerp": {}, "nuslerp": {},
    "multislerp": {}, "karcher": {}, "task_arithmetic": {"normalize": True}, "ties": {"density": 1.0},
    "dare_linear": {"density": 1.0, "normalize": True}, "dare_ties": {"density": 1.0, "normalize": True},
    "della": {"density": 1.0}, "della_linear": {"density": 1.0, "normalize": True},
    "breadcrumbs": {"density": 1.0, "normalize": True}, "breadcrumbs_ties": {"density": 1.0, "normalize": True},
    "sce": {}, "model_stock": {}, "ram": {"epsilon": 0.0}, "ramplus_tl": {"epsilon": 0.0}, "emr": {},
    "knots_ties": {"density": 1.0},
}  # fmt: skip
ORDERED = {"swa", "ema", "lawa", "slerp", "nuslerp", "passthrough", "nearswap", "arcee_fusion"}
DRAWN = {"dare_linear", "dare_ties", "della", "della_linear"}


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def count(name: str) -> int:
    return min(METHODS[name].most or 3, 3)


def parameters(name: str, **more: Any) -> dict[str, Any]:
    known = {parameter.name for parameter in METHODS[name].parameters}
    chosen = {key: value for key, value in CHOSEN.items() if key in known} | more
    return chosen if not name.startswith("ram") or "epsilon" in more else chosen | {"epsilon": 1e-5}


def base_of(name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    return random(shape, seed, dtype) if METHODS[name].base in (Base.ORIGIN, Base.OPTIONAL_ORIGIN) else None


@pytest.mark.parametrize("name", MEANS)
@settings(max_examples=15, deadline=None)
@given(shape=SHAPES, seed=SEEDS)
def test_merging_a_model_with_itself_gives_it_back(name: str, shape: tuple[int, ...], seed: int) -> None:
    model = random(shape, seed)
    merged = merge(name, [model] * count(name), base_of(name, shape, seed + 1), **parameters(name, **MEANS[name]))
    torch.testing.assert_close(merged, model, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=10, deadline=None)
@given(shape=SHAPES, seed=SEEDS)
def test_models_equal_to_the_base_give_the_base(name: str, shape: tuple[int, ...], seed: int) -> None:
    base = base_of(name, shape, seed)
    if base is not None:
        assert torch.equal(merge(name, [base] * count(name), base, **parameters(name)), base)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ORDERED | DRAWN])
@settings(max_examples=15, deadline=None)
@given(shape=SHAPES, seed=SEEDS, order=st.permutations(range(3)))
def test_the_order_of_the_models_does_not_matter(
    name: str, shape: tuple[int, ...], seed: int, order: list[int]
) -> None:
    models, base = (
        [random(shape, seed + k, torch.float64) for k in range(3)],
        base_of(name, shape, seed + 9, torch.float64),
    )
    merged = merge(name, [models[k] for k in order], base, **parameters(name))
    torch.testing.assert_close(merged, merge(name, models, base, **parameters(name)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in {"nearswap", "arcee_fusion", "ram", "ramplus_tl"}]
)
@settings(max_examples=10, deadline=None)
@given(shape=SHAPES, seed=SEEDS, power=st.integers(-20, 20))
def test_weights_in_another_unit_merge_the_same(name: str, shape: tuple[int, ...], seed: int, power: int) -> None:
    # Powers of two are exact in floating point, so that nothing may change but the scale.
    models, base = [random(shape, seed + k) for k in range(count(name))], base_of(name, shape, seed + 9)
    scaled = merge(
        name, [m * 2.0**power for m in models], None if base is None else base * 2.0**power, **parameters(name)
    )
    torch.testing.assert_close(scaled / 2.0**power, merge(name, models, base, **parameters(name)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in DRAWN | {"knots_ties"}])
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, rows=st.permutations(range(4)), columns=st.permutations(range(3)))
def test_permuted_models_give_the_permuted_merge(name: str, seed: int, rows: list[int], columns: list[int]) -> None:
    models = [random((4, 3), seed + k, torch.float64) for k in range(count(name))]
    base = base_of(name, (4, 3), seed + 9, torch.float64)

    def permuted(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[rows][:, columns]

    moved = merge(name, [permuted(m) for m in models], None if base is None else permuted(base), **parameters(name))
    expected = permuted(merge(name, models, base, **parameters(name)))
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("dtype", "expected"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_double_stays_double_and_half_is_computed_in_single(
    name: str, dtype: torch.dtype, expected: torch.dtype
) -> None:
    models = [random((4, 3), k).to(dtype) for k in range(count(name))]
    base = base_of(name, (4, 3), 9)
    before = [model.clone() for model in models]
    merged = merge(name, models, None if base is None else base.to(dtype), **parameters(name))
    assert merged.dtype == expected
    assert all(torch.equal(model, old) for model, old in zip(models, before, strict=True))


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if (entry.most or 2) > 1])
def test_weights_that_cancel_are_refused_or_give_finite_numbers(name: str) -> None:
    known = {parameter.name for parameter in METHODS[name].parameters}
    if "weight" not in known:
        return
    models, base = [random((4, 3), k) for k in range(2)], base_of(name, (4, 3), 9)
    each = {"weight": [0.5, -0.5]}
    chosen = {key: value for key, value in parameters(name).items() if key != "weight"}
    switches: list[dict[str, Any]] = [{"normalize": True}, {"normalize": False}] if "normalize" in known else [{}]
    for normalize in switches:
        try:
            assert merge(name, models, base, each=each, **chosen, **normalize).isfinite().all()
        except InvalidSpec as error:
            assert "sum to 0" in str(error)


@pytest.mark.parametrize("name", ["multislerp", "karcher", "ties", "della", "sce", "ram", "emr"])
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_one_model_is_itself(name: str, seed: int) -> None:
    more = {"density": 1.0} if name in ("ties", "della") else {"epsilon": 0.0} if name == "ram" else {}
    model = random((4, 3), seed)
    merged = merge(name, [model], base_of(name, (4, 3), seed + 1), **parameters(name, **more))
    torch.testing.assert_close(merged, model, rtol=1e-5, atol=1e-6)


LOW_RANK = [name for name in METHODS if name in {"tsv_m", "iso_c", "iso_cts", "knots_linear", "knots_ties"}]


def low_rank(seed: int, rank: int = 2, shape: tuple[int, int] = (9, 8)) -> torch.Tensor:
    left, right = random((shape[0], rank), seed, torch.float64), random((rank, shape[1]), seed + 1, torch.float64)
    return left @ right


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, models=st.integers(1, 4))
def test_tsv_of_an_adapter_with_itself_gives_it_back(seed: int, models: int) -> None:
    # It holds where every task has room for all its directions: rank · models ≤ min(rows, columns).
    adapter, base = low_rank(seed), torch.zeros(9, 8, dtype=torch.float64)
    torch.testing.assert_close(merge("tsv_m", [adapter] * models, base), adapter, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in LOW_RANK if name != "knots_ties"])
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, rows=st.permutations(range(9)), columns=st.permutations(range(8)))
def test_permuted_adapters_give_the_permuted_merge(name: str, seed: int, rows: list[int], columns: list[int]) -> None:
    adapters, base = [low_rank(seed + 2 * k) for k in range(3)], torch.zeros(9, 8, dtype=torch.float64)
    more = {"common": 0.5} if name == "iso_cts" else {}
    moved = merge(name, [a[rows][:, columns] for a in adapters], base, **parameters(name, **more))
    expected = merge(name, adapters, base, **parameters(name, **more))[rows][:, columns]
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-7)
