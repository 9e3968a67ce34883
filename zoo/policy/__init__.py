"""Tasks for policies: environments with scripted experts, and evaluation by success over paired episodes."""

from zoo.policy.demonstration import Demonstration, Task
from zoo.policy.evaluation import PolicyResults, evaluate_policy, wilson_interval
from zoo.policy.point import PointTask
from zoo.policy.pusht import PushTTask

__all__ = ["Demonstration", "PointTask", "PolicyResults", "PushTTask", "Task", "evaluate_policy", "wilson_interval"]
