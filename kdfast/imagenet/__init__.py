"""`kdfast distill --student NAME`: train a timm model from a timm teacher, on one process or under torchrun.

The parts, in the order a run meets them: ``settings`` (options and their checks), ``ranks`` (processes), ``readers``
(folders and shards), ``data`` (which images a step sees), ``networks``, ``stored`` (a teacher whose logits are on the
disk), ``train``, ``checkpoints``, ``log``; ``run`` puts them together, and ``command`` around it turns errors into
lines. timm has the models, the transforms, the optimizers, the schedule, the average of the weights and the test; what
is here is what it lacks: steps that can be made again exactly.
"""
