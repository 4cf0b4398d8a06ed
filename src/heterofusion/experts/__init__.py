"""An expert that answers: base, adapter and tokenizer; batched generation; soft labels across tokenizers."""
