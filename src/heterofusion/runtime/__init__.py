"""What every room uses: files, processes, base models and tokenizers, a user's errors."""
