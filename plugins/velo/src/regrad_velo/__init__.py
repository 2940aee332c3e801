"""VeLO, a learned optimizer, and the weights of its networks."""

from regrad_velo.optimizer import VeLO
from regrad_velo.weights import VeLOWeights, load_weights, random_weights, save_weights

__all__ = ["VeLO", "VeLOWeights", "load_weights", "random_weights", "save_weights"]
