import math

from ensemerge_server.metrics import Metrics
from ensemerge_server.servable import Reply, Timings
from ensemerge_server.store.records import Committed, LabelResult, LabelStatus, Scored


def page(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.page().decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_an_answer_is_counted_and_timed_once() -> None:
    metrics = Metrics()
    told = {"experiment": "digits", "arm": "merged", "assignment": "unit"}
    for _ in range(3):
        metrics.answered("digits", Reply({}, "2", told, Timings(0.001, 0.004, 8)), 0.006)
    samples = page(metrics)
    who = 'arm="merged",model="digits",version="2"'
    assert samples['ensemerge_requests_total{arm="merged",code="OK",model="digits",version="2"}'] == 3
    assert samples[f"ensemerge_request_duration_seconds_count{{{who}}}"] == 3
    assert math.isclose(samples[f"ensemerge_compute_duration_seconds_sum{{{who}}}"], 0.012)
    assert samples['ensemerge_assignments_total{arm="merged",assignment="unit",experiment="digits"}'] == 3
    assert samples['ensemerge_batch_rows_bucket{le="8.0",model="digits",version="2"}'] == 3
    assert samples['ensemerge_batch_rows_bucket{le="4.0",model="digits",version="2"}'] == 0


def test_each_row_is_counted_with_its_first_label() -> None:
    metrics = Metrics()
    scored = [Scored("m", "1", "", True, 0.5), Scored("m", "1", "", False, 1.5), Scored("m", "1", "", None, None)]
    results = [LabelResult(LabelStatus.JOINED)] * 3 + [LabelResult(LabelStatus.CONFLICT)]
    metrics.committed(Committed(results, scored, 2, [LabelResult(LabelStatus.JOINED)]))
    samples = page(metrics)
    who = '{arm="",model="m",version="1"}'
    assert samples[f"ensemerge_labelled_total{who}"] == 2
    assert samples[f"ensemerge_correct_total{who}"] == 1
    assert samples[f"ensemerge_log_loss_nats_total{who}"] == 2.0
    assert samples['ensemerge_labels_total{result="joined"}'] == 3
    assert samples['ensemerge_labels_total{result="conflict"}'] == 1
    assert samples["ensemerge_late_joins_total"] == 1
    assert samples["ensemerge_reused_client_ids_total"] == 2


def test_two_servers_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.refused("", "NOT_FOUND", {})
    assert 'ensemerge_requests_total{arm="",code="NOT_FOUND",model="",version=""}' in page(first)
    assert not any(name.startswith("ensemerge_requests_total") for name in page(second))
