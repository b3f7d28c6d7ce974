"""What a training minimises, in one language: ``Term(loss, weight, reads)``, and the ``Objective`` of several.

``terms``: the language, for a loop of your own, timm, Lightning and Accelerate, and the programs. ``connected``: losses
with the layers that their papers train beside the student. ``recipes``: public settings, as data.
"""

from kdfast.objectives import connected
from kdfast.objectives.connected import *  # noqa: F403
from kdfast.objectives.recipes import RECIPES, AsMaps, Part, Places, Recipe, recipe
from kdfast.objectives.terms import LOGITS, Objective, Observed, Term, of_layers

__all__ = ["LOGITS", "RECIPES", "AsMaps", "Objective", "Observed", "Part", "Places", "Recipe", "Term", "of_layers"]
__all__ += ["recipe"]
__all__ += connected.__all__
