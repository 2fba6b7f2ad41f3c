"""Instruction tuning by mutual alignment (MAIN, arXiv 2504.12913) in JAX and Flax.

The top level reads as the method: `align` -> `augment` -> `score` -> `filter` -> `finetune`, driven by
`pipeline`. `lm/` below it is a small language-model engine that knows nothing of the method.
"""

__version__ = "0.1.0"
