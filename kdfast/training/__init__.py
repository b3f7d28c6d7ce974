"""`kdfast train`: a timm model from a timm teacher, on one process or under torchrun.

The parts, in the order a run meets them: ``command`` (exit codes, whichever process fails), ``settings`` (options and
their checks), ``ranks`` (processes), ``run`` (puts the others together), ``readers`` (folders and shards), ``data``
(which images a step sees), ``networks``, ``store`` (a teacher whose logits are on the disk), ``trainer``, ``log``.
timm has the models, the transforms, the optimizers, the schedule, the average of the weights and the test; what is here
is what it lacks: steps that can be made again exactly.
"""
