"""Compare what the client saw with what the server counted: the same answers, the same labels, the same accuracy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.request import urlopen

import numpy as np

from ensemerge.demo.digits import Images
from ensemerge.demo.measure import Measurement
from ensemerge.measures.scores import correct
from ensemerge.repository import Check

_SAMPLE = re.compile(r'^ensemerge_(labelled|correct)_total\{arm="(.*)",model="(.*)",version="\d+"\} (\S+)$', re.M)


def check_counters(address: str, measurements: Sequence[Measurement], stream: Images) -> None:
    """Every label must have been counted once, and every right answer be right on both sides. Raises CheckFailed."""
    with urlopen(f"http://{address}/metrics") as page:
        samples = _SAMPLE.findall(page.read().decode())
    for measurement in measurements:
        hits = correct(np.stack(measurement.log.probabilities), stream.digits.numpy()[: measurement.rows])
        seen = {"labelled": measurement.rows, "correct": int(hits.sum())}
        for family, expected in seen.items():
            counted = sum(float(v) for name, _, model, v in samples if (name, model) == (family, measurement.model))
            detail = (
                f"difference between /metrics ({counted:.0f}) and the client ({expected}) for '{measurement.model}'"
            )
            Check.measured(f"counts_{family}", abs(counted - expected), 0, detail)
