"""What an evaluation found, for programs (JSON, CSV), for notes (Markdown) and for the eye (HTML)."""

from moebius_jax.evaluation.report.document import FORMAT, Run, build_document, finite
from moebius_jax.evaluation.report.html import render_html
from moebius_jax.evaluation.report.markdown import render_markdown
from moebius_jax.evaluation.report.table import render_csv

__all__ = ["FORMAT", "Run", "build_document", "finite", "render_csv", "render_html", "render_markdown"]
