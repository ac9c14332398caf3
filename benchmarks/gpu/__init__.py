"""The parts of benchmarks.run_gpu, and what surrounds them."""
