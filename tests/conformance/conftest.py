"""Keras runs on torch here: the backend is chosen before anything imports Keras. Without Keras the other peers stay."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
try:
    import keras  # noqa: F401
except ImportError:  # not installed: it comes with the conformance extra
    collect_ignore_glob = ["test_keras_*.py"]
