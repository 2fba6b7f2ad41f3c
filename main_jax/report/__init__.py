"""A run as one self-contained page, `RUN/report.html`: `page` builds it, `charts` draws, `files` reads."""
