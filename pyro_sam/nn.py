"""A network as a Bayesian module: every weight a Pyro sample site, and priors to go with it."""

import copy
import functools
import math
import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.autoguide import init_to_feasible
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.distributions import Distribution, Transform, constraints
from torch.utils._pytree import tree_flatten, tree_unflatten

