import pytest
import torch
from support.memory import InMemory

from ensemerge.errors import InvalidSpec
from ensemerge.merge.engine import Job, Machine, Source, worker_bytes
from ensemerge.merge.estimate import estimate_seconds
from ensemerge.merge.method import Grain
from ensemerge.merge.methods.averaging import WeightedSum
from ensemerge.merge.plan import OVERHEAD_BYTES, MergePlan, Output, fit, resident_bytes, with_tied

GIB = 1 << 30


def output(*shapes: tuple[int, ...], grain: Grain = Grain.ELEMENT) -> Output:
    reader = InMemory({f"w{k}": torch.zeros(1).expand(shape) for k, shape in enumerate(shapes)})
    method = WeightedSum([0.5, 0.5], grain)
    sources = {name: tuple(Source(reader, name, model) for model in "ab") for name in reader.names}
    return Output("", tuple(Job(name, reader.info(name), sources[name], None, method) for name in reader.names))


def test_without_a_bound_all_threads_are_used() -> None:
    machine, memory = fit([output((5000, 5000))], [], Machine(7), None)
    assert machine.threads == 7
    assert memory > resident_bytes()


def test_as_many_threads_as_fit() -> None:
    one = output((5000, 5000))
    need = worker_bytes(one.jobs[0], Machine())
    bound = resident_bytes() + OVERHEAD_BYTES + 3 * need + need // 2
    machine, memory = fit([one], [], Machine(64), bound)
    assert machine.threads in (2, 3)  # the test's own memory moves a little
    assert memory == bound


def test_too_little_is_refused_with_what_is_needed() -> None:
    with pytest.raises(InvalidSpec, match=r"'w0' needs .*; give at least"):
        fit([output((9000, 9000), grain=Grain.TENSOR)], [], Machine(2), resident_bytes() + OVERHEAD_BYTES + (1 << 20))


def test_a_matrix_that_cannot_be_cut_does_not_take_threads_from_the_others() -> None:
    mixed = Output("", (*output((20_000, 20_000), grain=Grain.TENSOR).jobs, *output((100, 100)).jobs))
    machine, _ = fit([mixed], [], Machine(4), 16 * GIB)
    assert machine.threads == 4
    assert machine.working_bytes is not None


def test_what_writers_and_readers_hold_counts() -> None:
    _, memory = fit([output((10, 10))], [], Machine(1), None)
    _, more = fit([output((10, 10))], [], Machine(1), None, extra_bytes=GIB)
    assert more - memory >= GIB // 2


def test_tied_tensors_are_written_out_with_the_same_draws() -> None:
    written = with_tied(output((3,), (4,)), {"head": "w0", "lost": "elsewhere"})
    assert [(job.name, job.drawn_as) for job in written.jobs] == [("w0", None), ("w1", None), ("head", "w0")]


def test_an_estimate_grows_with_the_work_and_reads_nothing() -> None:
    small, large = output((1 << 20,)), output((1 << 20,), *[(4096, 4096)] * 40)
    for made in (small, large):
        for job in made.jobs:
            assert isinstance(job.sources[0].reader, InMemory)
    plans = [MergePlan("linear", (made,), Machine(2), 0, ()) for made in (small, large)]
    first, second = (estimate_seconds(plan) for plan in plans)
    assert 0 < first < second
    assert all(not job.sources[0].reader.out for plan in plans for job in plan.jobs)  # type: ignore[attr-defined]
