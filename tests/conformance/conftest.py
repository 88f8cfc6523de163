"""Keras runs on torch here: the backend is chosen before anything imports Keras."""

import os

import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
pytest.importorskip("keras", reason="needs the conformance extra")
