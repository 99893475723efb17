"""Studies: the systems of the paper side by side, on data that a laptop can train on. ``pra study NAME``."""

from pra.studies.catalogue import STUDIES, Cell, Study
from pra.studies.settings import SCALES, SETTINGS, Scale, Setting
from pra.studies.study import run_study

__all__ = ["SCALES", "SETTINGS", "STUDIES", "Cell", "Scale", "Setting", "Study", "run_study"]
