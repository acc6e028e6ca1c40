"""masklr: train with masks, see the rank, use the rank.

A PyTorch Lightning framework in which masked training (dropout, DropConnect, structured dropout, masked autoencoders)
is a recipe, and the low rank it induces is measured, compared with theory, and used. Importing it imports nothing
heavy: take what you need from `masklr.tasks`, `masklr.callbacks`, `masklr.data`, `masklr.models` and `masklr.spectra`.
"""

__version__ = "0.1.0"
