"""What `benchmarks.throughput` has measured so far: a file per case, so that cases can be measured side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.loads import Measured
from benchmarks.provenance import describe_run
from dspark_hf.files import write_whole


class Store:
    """The measurements of one target.

    Args:
        folder: where the files are.
        stem: how their names begin; the case follows.
        settings: what makes measurements comparable; a file of other settings is begun anew.
    """

    def __init__(self, folder: Path, stem: str, settings: dict[str, Any]):
        self._folder = folder
        self._stem = stem
        self._settings = settings
        self._cases: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob(f"{stem}-*.json")):
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields["settings"] == settings:
                self._cases[fields["case"]] = fields

    def path(self, case: str, ending: str) -> Path:
        """Return a case's file."""
        return self._folder / f"{self._stem}-{case.replace(' ', '-')}.{ending}"

    def provenance(self, case: str) -> list[str]:
        """Return where the case's measurements came from; if not all from one place, with the rows of each."""
        by_place: dict[tuple[str, ...], list[int]] = {}
        for rows, one in self._cases[case]["rows"].items():
            by_place.setdefault(tuple(one["provenance"]), []).append(int(rows))
        if len(by_place) == 1:
            return list(next(iter(by_place)))
        named = [(", ".join(map(str, sorted(rows))), place) for place, rows in by_place.items()]
        return [f"{line} (rows {rows})" for rows, place in sorted(named) for line in place]

    def has(self, case: str, num_rows: int) -> bool:
        """Return whether that batch size is measured."""
        return case in self._cases and str(num_rows) in self._cases[case]["rows"]

    def add(self, case: str, num_rows: int, measured: dict[str, Measured]) -> None:
        """Add a batch size and write the case's file."""
        fields = self._cases.setdefault(case, {"case": case, "settings": self._settings, "rows": {}})
        fields["rows"][str(num_rows)] = {
            "provenance": describe_run(),
            "ways": {way: asdict(one) for way, one in measured.items()},
        }
        write_whole(self.path(case, "json"), (json.dumps(fields, indent=1) + "\n").encode())

    def results(self) -> dict[str, dict[int, dict[str, Measured]]]:
        """Return everything: by case, rows and way."""
        return {
            case: {
                int(rows): {way: Measured(**measured) for way, measured in one["ways"].items()}
                for rows, one in sorted(fields["rows"].items(), key=lambda pair: int(pair[0]))
            }
            for case, fields in self._cases.items()
        }
