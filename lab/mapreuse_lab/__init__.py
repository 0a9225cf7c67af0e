"""The study of attention map reuse: models, techniques, training, benchmarks."""
