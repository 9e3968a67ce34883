"""Tasks for policies: environments with scripted experts, and evaluation by success over paired episodes."""

from zoo.environments.demonstration import Demonstration, Task
from zoo.environments.evaluation import PolicyResults, evaluate_policy, wilson_interval
from zoo.environments.point import PointTask
from zoo.environments.pusht import PushTTask

__all__ = ["Demonstration", "PointTask", "PolicyResults", "PushTTask", "Task", "evaluate_policy", "wilson_interval"]
