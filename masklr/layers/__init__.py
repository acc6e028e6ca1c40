"""Masks and low rank as layers, and their insertion into any model: read `insertion.py` first."""

from masklr.layers.dropconnect import DropConnectConv2d, DropConnectLinear
from masklr.layers.factories import DropConnect, Dropout, DropPath, Groups, LayerFactory, LowRank
from masklr.layers.groups import GroupDropout
from masklr.layers.insertion import Mask, check_optimizer, insert, masking, remove
from masklr.layers.low_rank import LowRankConv2d, LowRankLinear

__all__ = [
    "DropConnect",
    "DropConnectConv2d",
    "DropConnectLinear",
    "DropPath",
    "Dropout",
    "GroupDropout",
    "Groups",
    "LayerFactory",
    "LowRank",
    "LowRankConv2d",
    "LowRankLinear",
    "Mask",
    "check_optimizer",
    "insert",
    "masking",
    "remove",
]
