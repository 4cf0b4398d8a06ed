"""LoRA adapters as files and tensors: reading, refusing, aligning, re-factoring, controls."""
