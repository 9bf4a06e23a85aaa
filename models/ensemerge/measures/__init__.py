"""Numbers about answers: scores, intervals, calibration, agreement. Pure functions on numpy arrays, nothing else.

Everywhere: `probabilities` is `(rows, classes) float`, each row summing to one; `labels` is `(rows,) int`, indices into
the classes.
"""
