"""A guard for CLIP image classifiers in production: vet the model, then screen its requests."""

__all__ = ["__version__"]

__version__ = "0.1.0"
