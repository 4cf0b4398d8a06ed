"""Labels from the source experts: each answers unlabelled prompts of the tasks that it is good at.

An expert runs on its own base, in its own tokenizer and chat template, one model in memory at a time; what it answers
is text, so the target may be of any family. `arguments` has the flags, `tasks` reads replay and prompts, `experts`,
`generation` and `answering` run models, `parts` keeps answers as they come, `routing` says which expert labels which
task, `formats` which answers the task's metric can read, `self_prompt` invents prompts where there are none, `soft`
stores what the experts think of their labels, `record` tells what was done, and `run` is all of it, for
`recipes/label.py`. `soft_targets` brings what `soft` stored into the tokens of a target that is trained on it.
"""
