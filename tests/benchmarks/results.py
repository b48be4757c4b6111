"""RESULTS.md: each benchmark keeps its last table there, in a section of its own."""

import importlib.metadata
import os
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
HEADER = (
    "# Last results\n\nWritten by the benchmarks beside this file with `--write`; each section is one run, its sides one after another.\n"
)


def write_section(title: str, text: str) -> None:
    """Puts `text` under the heading `title`, in place of what that section held."""
    whole = RESULTS.read_text() if RESULTS.exists() else HEADER
    heading = f"\n## {title}\n"
    before, found, after = whole.partition(heading)
    next_section = after.find("\n## ")
    rest = after[next_section:] if found and next_section >= 0 else ""
    RESULTS.write_text(f"{before.rstrip()}\n{heading}\n{text.strip()}\n{rest}")


def machine() -> str:
    """Processor, cores that this process may use, and the versions that matter."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ray", "transformers"))
    return f"{names[0] if names else 'unknown processor'}, {len(os.sched_getaffinity(0))} cores; {versions}"
