"""What a run will need on a machine that is not rented yet: memory of every program, and hours.

    main-jax plan configs/llama-2-7b-v5p.yaml --topology v5p:2x2x2

Each stage's program is compiled ahead of time for the machine, with every example as long as
`prompt.max_length`: what fits then always fits. Hours are arithmetic on the data's size (`Work`), the
model's FLOPs and the chip's published speeds; see `main_jax/lm/plan.py` for what is assumed.
"""

from main_jax.plan.calls import Call, Work, calls, model_of, work_of
from main_jax.plan.search import Plan, Row, compile_row, make_plan
from main_jax.plan.table import as_dict, show

__all__ = [
    "Call", "Plan", "Row", "Work", "as_dict", "calls", "compile_row", "make_plan", "model_of", "show",
    "work_of",
]  # fmt: skip
