"""Stacks of several processes as one flame graph: an SVG that needs no script. Root above, each frame as wide as its share of time."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TypeAlias

Stack: TypeAlias = tuple[str, ...]  # outermost frame first
WIDTH, ROW, TOP = 1600, 17, 46
LETTER = 6.1  # of the font, about, in pixels
MIN_SHARE = 0.002  # a frame narrower than this share of the whole is left out


def parse_stacks(text: str) -> dict[Stack, int]:
    """py-spy's raw format: a stack to a line, frames joined by `;`, then its samples. ValueError names a line that is none."""
    stacks: dict[Stack, int] = {}
    for line in text.splitlines():
        frames, _, number = line.rpartition(" ")
        if not frames or not number.isdigit():
            raise ValueError(f"{line!r} is not a stack with its samples")
        stack = tuple(frames.split(";"))
        stacks[stack] = stacks.get(stack, 0) + int(number)
    return stacks


@dataclass
class Node:
    """A frame in its place: its samples, those of the frames that it called included."""

    samples: float = 0.0
    callees: dict[str, "Node"] = field(default_factory=dict)


def fold(stacks: Mapping[Stack, float] | Iterable[tuple[Stack, float]]) -> Node:
    """The tree of all stacks."""
    root = Node()
    for stack, samples in stacks.items() if isinstance(stacks, Mapping) else stacks:
        node = root
        node.samples += samples
        for frame in stack:
            node = node.callees.setdefault(frame, Node())
            node.samples += samples
    return root


def draw(root: Node, title: str, note: str, unit: Callable[[float], str], colour: Callable[[Stack], str], file: Path) -> None:
    """`unit` says what a frame's samples are, `colour` what it is painted in; widest frames first, so that pictures compare."""
    parts: list[str] = []
    depth = _draw_callees(root, (), 0.0, WIDTH / root.samples, MIN_SHARE * root.samples, unit, colour, parts)
    height = TOP + ROW * depth + 8
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="monospace" font-size="10">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>\n'
        f'<text x="4" y="18" font-size="15" font-family="sans-serif">{escape(title)}</text>\n'
        f'<text x="4" y="36" font-size="11" font-family="sans-serif" fill="#555">{escape(note)}</text>\n{"".join(parts)}</svg>\n'
    )


def _draw_callees(
    node: Node,
    stack: Stack,
    x: float,
    scale: float,
    least: float,
    unit: Callable[[float], str],
    colour: Callable[[Stack], str],
    parts: list[str],
) -> int:
    """Appends what `node` called, from `x` on, one row below it; returns the rows that are used."""
    depth = len(stack)
    for name, callee in sorted(node.callees.items(), key=lambda item: -item[1].samples):
        if callee.samples < least:
            break
        inner = (*stack, name)
        width, y = callee.samples * scale, TOP + ROW * len(stack)
        letters = int((width - 4) / LETTER)
        text = ""
        if letters >= 3:
            text = f'<text x="{x + 2:.1f}" y="{y + 12}">{escape(name if len(name) <= letters else name[: letters - 1] + "…")}</text>'
        parts.append(
            f'<g><title>{escape(name)}: {escape(unit(callee.samples))}</title><rect x="{x:.1f}" y="{y}" '
            f'width="{max(width - 0.5, 0.3):.1f}" height="{ROW - 1}" rx="1" fill="{colour(inner)}"/>{text}</g>\n'
        )
        depth = max(depth, _draw_callees(callee, inner, x, scale, least, unit, colour, parts), len(inner))
        x += width
    return depth
