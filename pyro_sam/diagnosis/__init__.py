"""What is wrong with a training, and which setting to change."""

from pyro_sam.diagnosis.diagnosing import diagnose
from pyro_sam.diagnosis.report import Diagnosis, Problem

__all__ = ["Diagnosis", "Problem", "diagnose"]
