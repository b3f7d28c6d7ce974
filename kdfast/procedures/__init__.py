"""Methods that are more than a loss: which networks learn, in which order, and from whom.

The training loop stays yours. A procedure that trains one network after the other takes a function
``train(network, objective)``, which has to minimise ``objective(inputs, labels)`` over `network`; one that trains
several together has a ``step`` for your loop to call.
"""

from kdfast.procedures.explain import learn_sigma
from kdfast.procedures.generations import Ensemble, born_again
from kdfast.procedures.inversion import Augment, Change, ImagePrior, add_boxes, box_overlap, random_boxes, synthesize
from kdfast.procedures.mutual import MutualLearning
from kdfast.procedures.peers import PeerExchange, PeerWarning
from kdfast.procedures.refinery import refine_labels
from kdfast.procedures.residual import JointPaths, PathOutputs

__all__ = [
    "Augment",
    "Change",
    "Ensemble",
    "ImagePrior",
    "JointPaths",
    "MutualLearning",
    "PathOutputs",
    "PeerExchange",
    "PeerWarning",
    "add_boxes",
    "born_again",
    "box_overlap",
    "learn_sigma",
    "random_boxes",
    "refine_labels",
    "synthesize",
]
