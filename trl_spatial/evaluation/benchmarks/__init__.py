"""Public benchmarks of spatial understanding; each is a file and an entry in `BENCHMARKS`."""

from importlib import import_module

from .base import Benchmark


# name on the command line → MODULE:CLASS
BENCHMARKS = {
    "dpg-bench": "dpg_bench:DPGBench",
    "geneval": "geneval:GenEval",
    "geneval2": "geneval2:GenEval2",
    "oneig-alignment": "oneig_alignment:OneIGAlignment",
    "spatialbench-uc": "spatialbench_uc:SpatialBenchUC",
    "spatialgeneval": "spatialgeneval:SpatialGenEval",
    "t2i-compbench-2d": "t2i_compbench:T2ICompBench2D",
    "t2i-compbench-3d": "t2i_compbench:T2ICompBench3D",
    "t2i-corebench": "t2i_corebench:T2ICoReBench",
    "tiif": "tiif:TIIF",
    "unigenbench-long": "unigenbench:UniGenBenchLong",
    "unigenbench-short": "unigenbench:UniGenBenchShort",
    "visor": "visor:VISOR",
}


def make_benchmark(name: str) -> Benchmark:
    """
    Returns a benchmark by its name.

    Raises:
        `ValueError`: If there is none of that name.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"There is no benchmark {name!r}. Available: {', '.join(BENCHMARKS)}.")
    module, _, class_name = BENCHMARKS[name].partition(":")
    return getattr(import_module(f".{module}", __name__), class_name)()
