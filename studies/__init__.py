"""The laboratory: studies that train the paper's systems side by side, on data that a laptop can train on.

It is not part of the package. Run ``python -m studies NAME`` in the root of a clone; results lie in ``studies/NAME``.
"""

from studies.catalogue import STUDIES, Cell, Study
from studies.settings import SCALES, SETTINGS, Scale, Setting
from studies.study import run_study

__all__ = ["SCALES", "SETTINGS", "STUDIES", "Cell", "Scale", "Setting", "Study", "run_study"]
