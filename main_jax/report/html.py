"""From a template in `templates/` to a page: one file, no script, nothing loaded, every text escaped.

html = render("run.html", name="demo", ...)         # what a template lacks is an error
"""

from __future__ import annotations

from typing import Any

import jinja2
from etils import epath

from main_jax.pairs import write_atomically
from main_jax.report import charts


def render(template: str, **values: Any) -> str:
    """A page as HTML; its Content-Security-Policy (`base.html`) forbids scripts and loading."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("main_jax.report"),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": charts.number, "clock": clock}
    html = environment.get_template(template).render(colours=charts.COLOURS, **values)
    return html.encode("utf-8", "replace").decode()


def write(page: epath.Path, html: str) -> None:
    """Writes a page, atomically; by the process that calls."""
    write_atomically(page, lambda temporary: temporary.write_bytes(html.encode()), own=True)


def clock(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
