"""LightningModules; the model comes in as an argument."""

from masklr.tasks.pretraining import Pretraining

__all__ = ["Pretraining"]
