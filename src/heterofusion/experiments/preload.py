"""What the fork server imports, so that the runs need not: nearly all that the recipes import."""

import logging

logging.getLogger().addHandler(logging.NullHandler())  # libraries that warn of what is not installed

import datasets  # noqa: E402, F401
import scipy.stats  # noqa: E402, F401
import sklearn.metrics  # noqa: E402, F401
import transformers.trainer  # noqa: E402, F401

import heterofusion.runtime.program  # noqa: E402
import heterofusion.training.trainer  # noqa: E402, F401
