"""What travels with a saved checkpoint: configuration, low-rank layers and experts, and the models made of them."""
