"""Who described each method, for the model card. A method that is not here has no paper that we know of."""

from __future__ import annotations

from collections.abc import Mapping

_WORTSMAN = "Wortsman et al. 2022, arXiv 2203.05482"
_YADAV = "Yadav et al. 2023, arXiv 2306.01708"
_YU = "Yu et al. 2024, arXiv 2311.03099"
_DEEP = "Deep et al. 2024, arXiv 2406.11617"
_DAVARI = "Davari & Belilovsky 2023, arXiv 2312.06795"
_MARCZAK = "Marczak et al. 2025, arXiv 2502.04959"
_STOICA = "Stoica et al. 2025, arXiv 2410.19735"

CITATIONS: Mapping[str, str] = {
    "linear": _WORTSMAN,
    "uniform_soup": _WORTSMAN,
    "swa": "Izmailov et al. 2018, arXiv 1803.05407",
    "lawa": "Kaddour 2022, arXiv 2209.14981",
    "slerp": "Shoemake 1985, doi 10.1145/325334.325242",
    "task_arithmetic": "Ilharco et al. 2023, arXiv 2212.04089",
    "ties": _YADAV,
    "dare_linear": _YU,
    "dare_ties": f"{_YU}; {_YADAV}",
    "della": _DEEP,
    "della_linear": _DEEP,
    "breadcrumbs": _DAVARI,
    "breadcrumbs_ties": f"{_DAVARI}; {_YADAV}",
    "sce": "Wan et al. 2024, arXiv 2408.07990",
    "model_stock": "Jang et al. 2024, arXiv 2403.19522",
    "emr": "Huang et al. 2024, arXiv 2405.17461",
    "tall_masks": "Wang et al. 2024, arXiv 2405.07813",
    "tsv_m": "Gargiulo et al. 2025, arXiv 2412.00081",
    "iso_c": _MARCZAK,
    "iso_cts": _MARCZAK,
    "knots_linear": _STOICA,
    "knots_ties": _STOICA,
}
