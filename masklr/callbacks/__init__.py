"""Callbacks for any LightningModule; what each logs stands in its docstring."""

from masklr.callbacks.final_test import FinalTest
from masklr.callbacks.freed_memory import FreedMemory
from masklr.callbacks.gradient_spectrum import GradientSpectrum
from masklr.callbacks.induced_penalty import InducedPenalty
from masklr.callbacks.mask_schedule import MaskSchedule
from masklr.callbacks.nonfinite import NonFinite
from masklr.callbacks.peers import Peers
from masklr.callbacks.probe import Probe
from masklr.callbacks.reconstructions import Reconstructions
from masklr.callbacks.representation_spectrum import RepresentationSpectrum
from masklr.callbacks.run_checkpoint import RunCheckpoint
from masklr.callbacks.run_state import RunState
from masklr.callbacks.step_progress import StepProgress
from masklr.callbacks.step_seed import StepSeed
from masklr.callbacks.step_timing import StepTiming
from masklr.callbacks.update_spectrum import UpdateSpectrum
from masklr.callbacks.weight_spectrum import WeightSpectrum

__all__ = [
    "FinalTest",
    "FreedMemory",
    "GradientSpectrum",
    "InducedPenalty",
    "MaskSchedule",
    "NonFinite",
    "Peers",
    "Probe",
    "Reconstructions",
    "RepresentationSpectrum",
    "RunCheckpoint",
    "RunState",
    "StepProgress",
    "StepSeed",
    "StepTiming",
    "UpdateSpectrum",
    "WeightSpectrum",
]
