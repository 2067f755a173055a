"""protlm score: a model and mutants to scores, beside baselines and measurements."""
