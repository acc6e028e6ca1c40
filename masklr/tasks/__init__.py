"""LightningModules; the model comes in as an argument."""

from masklr.tasks.classification import Classification
from masklr.tasks.pretraining import Pretraining
from masklr.tasks.regression import Regression

__all__ = ["Classification", "Pretraining", "Regression"]
