"""The adaptive multi-granularity distillation of the paper's section 3.3, as pure functions."""
