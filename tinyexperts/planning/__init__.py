"""What a run takes, before it is run: parameters, FLOPs, bytes, and the time of a step on a mesh of devices."""

from tinyexperts.extras import require_extra

require_extra("train", __name__)

from tinyexperts.planning.devices import Devices
from tinyexperts.planning.mesh_plan import MeshPlan, plan, smaller_plans
from tinyexperts.planning.model_costs import Account, account

__all__ = ["Account", "Devices", "MeshPlan", "account", "plan", "smaller_plans"]
