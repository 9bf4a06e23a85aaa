"""`ensemerge label`: tell a server the truth about earlier answers."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ensemerge_client.client import Client
from ensemerge_client.errors import ClientError, InvalidArgument
from ensemerge_client.results import Label, LabelStatus

EXAMPLE = "example: ensemerge label labels.csv      (columns prediction_id, row, label; optional time_seconds)"
COLUMNS = ("prediction_id", "row", "label")


def main(arguments: Sequence[str] | None = None) -> int:
    """Send the labels of a CSV file. The exit status is 1 when one of them can never hold."""
    options = _parser().parse_args(arguments)
    try:
        numbered = list(read_labels(options.file))
        with Client(options.server, timeout_seconds=options.timeout) as client:
            results = client.send_labels(label for _, label in numbered)
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts = Counter(result.status for result in results)
    if options.json:
        print(json.dumps({status.name.lower(): counts[status] for status in LabelStatus}))
    else:
        print(", ".join(f"{counts[status]} {status.name.lower()}" for status in LabelStatus if counts[status]))
    for (line, _), result in zip(numbered, results, strict=True):
        if result.status is LabelStatus.INVALID:
            print(f"line {line}: {result.message}", file=sys.stderr)
    return 1 if counts[LabelStatus.INVALID] else 0


def read_labels(path: Path) -> Iterator[tuple[int, Label]]:
    """The labels of a CSV file, each with its line: a class by its index, or by its name if that is no number.

    Raises InvalidArgument.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise InvalidArgument(f"{path}: no column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
            for row in reader:
                yield reader.line_num, _label(row, f"{path}, line {reader.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}") from error


def _label(row: dict[str, str], where: str) -> Label:
    text = row["label"] or ""
    try:
        return Label(
            prediction_id=row["prediction_id"],
            row=int(row["row"] or 0),
            truth=int(text) if text.isdecimal() else text,
            time_seconds=float(row.get("time_seconds") or 0),
        )
    except ValueError as error:
        raise InvalidArgument(
            f"{where}: {error}; expected whole numbers in 'row', seconds in 'time_seconds'"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ensemerge label", description=main.__doc__, epilog=EXAMPLE)
    parser.add_argument("file", type=Path, help="a CSV file with a header")
    parser.add_argument("--server", default="localhost:8001", help="host:port (default localhost:8001)")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--json", action="store_true", help="the counts as one line of JSON")
    return parser
