"""reasonrun: run LLM self-training experiments from a recipe."""

__version__ = "0.1.0"
