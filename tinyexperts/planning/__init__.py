"""What a run takes, before it is run: parameters, FLOPs, bytes, and the time of a step on a mesh of devices."""

from tinyexperts.planning.accounting import Account, account
from tinyexperts.planning.mesh_plan import Devices, MeshPlan, plan, smaller_plans

__all__ = ["Account", "Devices", "MeshPlan", "account", "plan", "smaller_plans"]
