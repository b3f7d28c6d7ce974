"""Benchmarks of kdfast: `harness` measures, the `bench_*` files say what, `report` makes tables of it."""
