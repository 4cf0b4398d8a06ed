"""What is written beside an adapter and pushed: record, card, folder, Hub."""
