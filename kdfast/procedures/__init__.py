"""Methods that are more than a loss: which networks learn, in which order, and from whom.

The training loop stays yours. A procedure that trains one network after the other takes a function
``train(network, objective)``, which has to minimise ``objective(inputs, labels)`` over `network`; one that trains
several together has a ``step`` for your loop to call.
"""

from kdfast.procedures.generations import Ensemble, born_again
from kdfast.procedures.mutual import MutualLearning
from kdfast.procedures.peers import PeerExchange, PeerWarning
from kdfast.procedures.refinery import refine_labels

__all__ = ["Ensemble", "MutualLearning", "PeerExchange", "PeerWarning", "born_again", "refine_labels"]
