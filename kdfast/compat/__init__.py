"""The losses of other distillation libraries under their own names, on kdfast's kernels: change an import, not a loop.

``kdfast.compat.repdistiller``, ``kdfast.compat.mdistiller`` and ``kdfast.compat.torchdistill`` have the constructors,
argument order, return types and numbers of the originals; what differs is said at each loss. Their attributes act when
they are set later, and their methods when a subclass replaces them. In all of them a loss is float32 where the original
returns float16 or bfloat16. Of lists of unequal length the last layers of the longer one are left out, as there, with a
warning. Errors call the two networks student and teacher.
"""
