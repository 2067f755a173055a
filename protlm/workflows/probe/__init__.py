"""`protlm probe`: what a linear model can read from a model's embeddings, beside baselines."""
