"""What every program needs: a run is a folder with its settings, its checkpoints and its results.

``errors`` (one line for the user), ``options`` (declared once: help, default, check), ``folder`` (a run's folder and
its settings.json), ``files`` and ``checkpoints`` (whole or absent), ``determinism`` (the same bits), ``command`` (exit
codes), ``progress``, ``tables``, and ``images`` (folders of images).
"""
