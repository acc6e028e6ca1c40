"""LightningModules; the model comes in as an argument."""

from masklr.tasks.pretraining import Pretraining
from masklr.tasks.regression import Regression

__all__ = ["Pretraining", "Regression"]
