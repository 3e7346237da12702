"""Perceptual fusion: web image-text pairs in, hyper-detailed and true captions out."""

__version__ = "0.1.0"
