"""Images as LightningDataModules: batches of (uint8 images, labels, positions), exact over ranks and resumes."""

from masklr.data.augment import RandomCrop, RandomHorizontalFlip, RandomResizedCrop
from masklr.data.decoding import SampleError
from masklr.data.digits import Digits
from masklr.data.images import TorchvisionImages
from masklr.data.loading import ImageData
from masklr.data.mixing import Mixing
from masklr.data.shards import ShardedImages
from masklr.data.synthetic import Synthetic

__all__ = [
    "Digits",
    "ImageData",
    "Mixing",
    "RandomCrop",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "SampleError",
    "ShardedImages",
    "Synthetic",
    "TorchvisionImages",
]
