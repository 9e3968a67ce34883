"""Tasks for policies: an environment with a scripted expert, and evaluation by success over paired episodes."""

from zoo.policy.evaluation import PolicyResults, evaluate_policy, wilson_interval
from zoo.policy.point import Demonstration, PointTask

__all__ = ["Demonstration", "PointTask", "PolicyResults", "evaluate_policy", "wilson_interval"]
