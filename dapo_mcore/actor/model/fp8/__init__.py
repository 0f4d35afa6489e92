"""FP8 matrix products in the layers: which recipe a run uses, and on a CPU the same numbers simulated.

Change here: recipes, their rules and defaults (rules.py), their codes and scales (numbers.py), and where the simulation
replaces a product (layers.py). On a GPU Transformer Engine computes the products.
"""
