"""tcompress makes released neural networks smaller without their training code."""

__version__ = "0.1.0"
