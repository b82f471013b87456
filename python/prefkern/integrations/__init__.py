"""prefkern inside other libraries: transformers, TRL, verl, slime and NeMo-RL, a module each. Importing this imports none."""
