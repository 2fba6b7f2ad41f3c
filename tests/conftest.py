"""Tests compute on one CPU device, however many cores there are; more are for processes of their own."""

import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
