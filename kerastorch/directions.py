"""Which way a value is better, as far as its name tells."""

from __future__ import annotations

import re

# Of a name in snake case: long words anywhere in it, short ones on their own, where a number may follow (`top5`).
HIGHER_IS_BETTER = re.compile(
    r"accuracy|precision|recall|auroc|correlation|corr_coef|structural_similarity|explained_variance|exact_match|"
    r"noise_ratio|distortion_ratio|quality|"
    r"(?:^|_)(?:acc|auc|ap|map|f1|f2|f_?beta|f_?score|r2|top|hits?|io_?u|jaccard|dice|kappa|mcc|matthews|pearson|"
    r"spearman|sensitivity|specificity|n?dcg|mrr|bleu|rouge|bert_score|psnr|ssim|reward)(?=_|\d|$)"
)
# Whatever else the name says: `accuracy_loss`.
LOWER_IS_BETTER = re.compile(
    r"(?:^|_)(?:loss|error|err|mse|mae|rmse|mape|msle|cross_?entropy|perplexity|divergence|hinge|poisson|log_?cosh)(?=_|\d|$)"
)


def direction(name: str) -> int:
    """1 where higher is better, -1 where lower is, 0 where the name does not tell.

    Example:
        >>> [direction(name) for name in ("val_top5_accuracy", "BinaryF1Score", "accuracy_loss", "perplexity", "lr")]
        [1, 1, -1, -1, 0]
    """
    snake = re.sub(r"\W+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)).lower()
    if LOWER_IS_BETTER.search(snake):
        return -1
    return 1 if HIGHER_IS_BETTER.search(snake) else 0
