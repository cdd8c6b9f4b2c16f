"""Benchmark of the layer on this machine: its operator by the memory's limit, its parts, and what stands beside it.

`tinyexperts bench layer` runs it; benchmarks/cpu_layer.py measures the claims of the README with it.
"""

from tinyexperts.bench.measurement import measure_setting
from tinyexperts.bench.run import LayerBenchmarkConfig, run_layer_benchmark

__all__ = ["LayerBenchmarkConfig", "measure_setting", "run_layer_benchmark"]
