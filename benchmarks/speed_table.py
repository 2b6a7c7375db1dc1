"""The record of ``bitbybit bench`` as a Markdown table: how many times faster the runtime is than each program.

bitbybit bench artifacts/cifar10_*_integer.onnx --data-dir DATA -o benchmarks/results
python benchmarks/speed_table.py benchmarks/results/bench.json --batch 1 64
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def table(group: dict[str, Any], batches: list[int]) -> list[str]:
    """Lines of the table of one network's artifacts."""
    files = [entry["file"] for entry in group["artifacts"]]
    rows = [row for row in group["rows"] if row["batch"] in batches]
    lines = ["| threads, batch | program | ms an image | " + " | ".join(Path(file).stem for file in files) + " |"]
    lines.append("|---" * (3 + len(files)) + "|")
    for row in sorted(rows, key=lambda row: (row["threads"], row["batch"])):
        cells = []
        for file in files:
            related = row.get("artifact") in (None, file)  # another artifact's peer is no peer of this one
            ratio = row["ratio"].get(file)
            shown = ratio is not None and related and not _is_runtime(row)
            cells.append(f"{ratio:.2f} x" if shown else "")
        setting = f"{row['threads']}, {row['batch']}"
        lines.append(f"| {setting} | {row['program']} | {row['ms_per_image']:.3f} | " + " | ".join(cells) + " |")
    return lines


def scaling(group: dict[str, Any], batch: int) -> list[str]:
    """What two threads give over one, for each artifact."""
    own = [row for row in group["rows"] if row["batch"] == batch and _is_runtime(row)]
    found = {(row["artifact"], row["threads"]): row["ms_per_image"] for row in own}
    return [
        f"{file}: {found[file, 1] / found[file, 2]:.2f} x on two threads, batch {batch}"
        for file in (entry["file"] for entry in group["artifacts"])
        if (file, 1) in found and (file, 2) in found
    ]


def _is_runtime(row: dict[str, Any]) -> bool:
    return row["program"].split(":")[0] == "runtime"


def main() -> None:
    """Prints every group's table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    options = parser.parse_args()
    for group in json.loads(options.record.read_text())["groups"]:
        print("\n".join([*table(group, options.batch), "", *scaling(group, options.batch[-1]), ""]))


if __name__ == "__main__":
    main()
