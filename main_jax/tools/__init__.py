"""`score`, `filter` and `generate` outside a run: any checkpoint, any file, rows in the same order out.

Scoring and generation commit chunks beside the output, in OUTPUT.partial, until it is written: what is
stopped or killed continues with the same command. Several processes share the chunks.
"""
