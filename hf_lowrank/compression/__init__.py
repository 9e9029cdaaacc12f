"""model + statistics + budget → the same model with factors in the place of its layers, and a report."""
