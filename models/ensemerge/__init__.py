"""ensemerge, the workshop: make one answer out of several trained models, and prove what was made.

The package is imported piece by piece (`from ensemerge.build import build`), so that the server can use
`errors`, `measures` and `repository` without loading torch.
"""

__version__ = "0.1.0"
