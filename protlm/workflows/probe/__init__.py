"""`protlm probe`: labels predicted from embeddings by a linear model, beside baselines."""
