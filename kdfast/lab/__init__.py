"""`kdfast compare` and `kdfast study`: losses side by side, and methods to their result, on small data.

A comparison, in the order a run meets its parts: ``compare`` (options), ``comparison`` (the run), ``data``,
``networks``, ``experiments`` (one row per loss), ``students`` (several that learn together), ``trainer``, ``timing``,
``report``. A study: ``study`` (options), ``studies.runner``, and a module of ``studies`` for each.
"""
