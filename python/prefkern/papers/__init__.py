"""One module per paper, named by the paper: a citation, its equations, and a thin composition of ops."""

from . import grpo

__all__ = ["grpo"]
