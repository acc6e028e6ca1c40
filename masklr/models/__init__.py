"""Networks. They never import Lightning; timm is imported when one is built, since it takes seconds."""

from masklr.models.classifier import Classifier
from masklr.models.linear import DeepLinear
from masklr.models.mae import MAEOutput, MaskedAutoencoder
from masklr.models.mlp import MLP

__all__ = ["MLP", "Classifier", "DeepLinear", "MAEOutput", "MaskedAutoencoder"]
