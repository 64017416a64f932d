"""FogGen: a self-aware edge-cloud router for small language models, as a reproducible recipe."""

__version__ = "0.1.0"
