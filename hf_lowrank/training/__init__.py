"""A model and a task's data → the trained model, and scores."""
