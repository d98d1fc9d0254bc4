"""Tables for people. Rich on a terminal; aligned plain text in a file, a pipe or CI."""

from __future__ import annotations

import sys
from collections.abc import Sequence

Column = tuple[str, str]  # heading, "<" or ">"


def print_table(title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]], file=None) -> None:
    file = file or sys.stdout
    if file.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(title=title, title_justify="left", header_style="bold")
            for heading, side in columns:
                table.add_column(heading, justify="right" if side == ">" else "left", no_wrap=side == ">")
            for row in rows:
                table.add_row(*row)
            Console(file=file).print(table)
            return
    print(plain_table(title, columns, rows), file=file, flush=True)


def plain_table(title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    cells = [[heading for heading, _ in columns], *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(f"{cell:{side}{width}}" for cell, (_, side), width in zip(row, columns, widths)).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([title, line(cells[0]), rule, *map(line, cells[1:])])


def seconds_text(seconds: float) -> str:
    """Three significant figures with the unit that fits: 12.3 us."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{figures(seconds * scale)} {unit}"
    return f"{figures(seconds * 1e9)} ns"


def bytes_text(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{figures(count / scale)} {unit}"
    return f"{count:.0f} B"


def figures(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
