"""What bench_serving_sm100.py does, once it runs in an environment with sglang."""
