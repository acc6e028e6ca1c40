"""Networks. They never import Lightning; timm is imported when one is built, since it takes seconds."""

from masklr.models.mae import MAEOutput, MaskedAutoencoder

__all__ = ["MAEOutput", "MaskedAutoencoder"]
