"""What may happen beside the training: base class and ready-made callbacks."""

from .base import Callback as Callback
from .progress import ProgressBar as ProgressBar
