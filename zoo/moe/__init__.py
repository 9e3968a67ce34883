"""Mixtures of experts made from dense models: conversion, routing, losses of distillation.

Dense2MoE (ICCV 2025), https://arxiv.org/abs/2510.09094; MoE++ (ICLR 2025), https://arxiv.org/abs/2410.07348.
"""

from zoo.moe.blocks import BlockGroup, MixtureOfBlocks, MoBConfig, block_groups, mix_blocks
from zoo.moe.dense2moe import MoEConfig, MoEReport, activated_parameters, expert_layers, set_top_k
from zoo.moe.experts import MoEFFN
from zoo.moe.losses import balance_loss, entropy_loss, feature_loss, record_balance, record_entropy
from zoo.moe.modulation import share_modulation
from zoo.moe.pruning import ExpertPruneConfig, prune_experts
from zoo.moe.router import Router
from zoo.moe.routing import RoutingSummary, record_routing
from zoo.moe.sigma_moe import SigmaMoEConfig
from zoo.moe.transformers import convert, load_transformer, to_dense

__all__ = [
    "BlockGroup",
    "ExpertPruneConfig",
    "MixtureOfBlocks",
    "MoBConfig",
    "MoEConfig",
    "MoEFFN",
    "MoEReport",
    "Router",
    "RoutingSummary",
    "SigmaMoEConfig",
    "activated_parameters",
    "balance_loss",
    "block_groups",
    "convert",
    "entropy_loss",
    "expert_layers",
    "feature_loss",
    "load_transformer",
    "mix_blocks",
    "prune_experts",
    "record_balance",
    "record_entropy",
    "record_routing",
    "set_top_k",
    "share_modulation",
    "to_dense",
]
