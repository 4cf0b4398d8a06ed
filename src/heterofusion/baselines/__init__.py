"""What a user would do instead of a fusion: merging, distillation from the experts, ensembles of them."""
