"""SPViT to the number: the paper's search, its published architectures, its released checkpoints.

He et al., "Pruning Self-attentions into Convolutional Layers in Single Path", TPAMI 2024, arXiv 2111.11802; code of the
authors: github.com/ziplab/SPViT. msa2conv's own gate search generalises it and differs where that does better; here is
everything in which the paper's code is different.
"""

from .checkpoint import load_checkpoint
from .costs import Figures, figures, paper_costs
from .published import Architecture, plan, published
from .recipe import Recipe, config, hard_distillation
from .search import finetune_plan, load_search, optimizers, prepare

__all__ = [
    "Architecture",
    "Figures",
    "Recipe",
    "config",
    "figures",
    "finetune_plan",
    "hard_distillation",
    "load_checkpoint",
    "load_search",
    "optimizers",
    "paper_costs",
    "plan",
    "prepare",
    "published",
]
