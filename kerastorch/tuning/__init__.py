"""What is found by trying before a run: the batch size that fits, and a good learning rate.

Both try with runs of `fit` that leave no trace (`rehearsal.py`). `batch_size.py` is a search over trials, with how much
memory there is and was taken in `budget.py` and how much it will be in `forecast.py`; `lr.py` sweeps the rate, reads
the curve and confirms what it suggests.
"""

from .batch_size import BatchSize as BatchSize
from .batch_size import find_batch_size as find_batch_size
from .batch_size import known_size as known_size
from .lr import LearningRate as LearningRate
from .lr import apply_rate as apply_rate
from .lr import find_lr as find_lr
