"""Markdown tables of what `pytest --benchmark-only --benchmark-json=FILE` wrote: `python benchmarks/table.py FILE`."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def tables(benchmarks: list[dict[str, Any]]) -> str:
    """One table a group; ratios are to its side named eager (or the one that starts with it), larger is faster.

    Benchmarks that are whole comparisons have no side: of them, what they found.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for benchmark in benchmarks:
        if "side" in benchmark["extra_info"]:
            groups[benchmark["group"]].append(benchmark["extra_info"])
    lines = []
    for group, sides in groups.items():
        eager = next((side for side in sides if side["side"].startswith("eager")), sides[0])
        lines += [
            f"**{group}**",
            "",
            "| side | ms | of it backward | speed | of the ceiling | extra memory |",
            "|---|---|---|---|---|---|",
        ]
        for side in sides:
            ratio = eager["median_s"] / side["median_s"]
            ceiling = next((f"{side[key]:.0%} of {name}" for key, name in CEILINGS.items() if key in side), "")
            memory = f"{side['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in side else ""
            backward = f"{side['backward_s'] * 1000:.1f}" if "backward_s" in side else ""
            lines.append(
                f"| {side['side']} | {side['median_s'] * 1000:.1f} | {backward} | {ratio:.2f}x | {ceiling} | {memory} |"
            )
        lines.append("")
    for benchmark in benchmarks:
        if "side" not in benchmark["extra_info"] and (figures := dict(facts(benchmark["extra_info"]))):
            lines += [f"**{benchmark['group']}: {benchmark['name']}**", "", "| | |", "|---|---|"]
            lines += [f"| {name} | {value} |" for name, value in figures.items()]
            lines.append("")
    return "\n".join(lines)


def facts(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Texts, numbers and pairs of numbers, those in mappings under "mapping key"; series are left to the file."""
    for name, value in values.items():
        match value:
            case str() | int():
                yield prefix + name, str(value)
            case float():
                yield prefix + name, f"{value:.4g}"
            case [int() | float() as first, int() | float() as second]:
                yield prefix + name, f"{first:.4g}, {second:.4g}"
            case dict():
                yield from facts(value, f"{prefix}{name} ")


CEILINGS = {"share_of_copy": "copy bandwidth", "share_of_products": "matrix rate"}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(tables(json.loads(Path(name).read_text(encoding="utf-8"))["benchmarks"]))
