"""A small, sharded language-model engine that knows nothing of the method built on it."""
