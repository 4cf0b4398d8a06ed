"""Labels from the source experts: each answers unlabelled prompts of the tasks that it is good at."""
