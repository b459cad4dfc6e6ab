"""What an evaluation found, for programs (JSON, CSV), for notes (Markdown) and for the eye (HTML)."""
