"""Training: the configuration and trainer of a fusion, engines, checkpoints, mixtures, experts."""
