"""The method: contexts, hypernetworks, RDM, live updates, and the model around them."""
