"""Training float baselines and fine-tuning hashed networks."""

from bitbybit.training.evaluate import evaluate
from bitbybit.training.loop import TrainResult, train
from bitbybit.training.options import TrainOptions
from bitbybit.training.prepare import reestimate_batch_norm

__all__ = ["TrainOptions", "TrainResult", "evaluate", "reestimate_batch_norm", "train"]
