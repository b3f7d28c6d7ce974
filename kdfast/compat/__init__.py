"""The losses of other distillation libraries under their own names, on kdfast's kernels: change an import, not a loop.

``kdfast.compat.repdistiller``, ``kdfast.compat.mdistiller`` and ``kdfast.compat.torchdistill`` have the constructors,
argument order, return types and numbers of the originals; what differs is said at each loss. In all of them a loss is
float32 where the original returns float16 or bfloat16, and lists of layers are equally long, where the originals leave
out the rest of the longer one. Errors call the two networks student and teacher.
"""
