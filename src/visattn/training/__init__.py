"""One trial: a network, a data set and a seed in, scores per epoch out."""

from visattn.training.trial import Epoch, TrainingError, TrialSettings, parameter_groups, train

__all__ = ["Epoch", "TrainingError", "TrialSettings", "parameter_groups", "train"]
