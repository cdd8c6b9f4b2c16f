"""The benchmark of the layer on this machine: its operator against the memory's limit, its parts, and baselines.

`tinyexperts bench layer` runs it, `tinyexperts bench tables` compares tables of fewer bits, and benchmarks/cpu_layer.py
measures the claims of the README with both.
"""

from tinyexperts.extras import require_extra

require_extra("study", __name__)

from tinyexperts.bench.measurement import measure_setting
from tinyexperts.bench.run import LayerBenchmarkConfig, run_layer_benchmark
from tinyexperts.bench.tables import TablesBenchmarkConfig, run_tables_benchmark

__all__ = [
    "LayerBenchmarkConfig",
    "TablesBenchmarkConfig",
    "measure_setting",
    "run_layer_benchmark",
    "run_tables_benchmark",
]
