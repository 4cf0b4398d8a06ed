"""What a user would do instead: distillation and ensembles."""
