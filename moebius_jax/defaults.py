"""Names and numbers that programs show before anything is loaded."""

DEFAULT_MODEL = "hustvl/Moebius"  # on the Hub
TINY = "tiny"  # the model that comes with the package (docs/tiny.md)
DTYPES = ("float32", "float16", "bfloat16")  # that networks compute and are kept in

DEFAULT_GUIDANCE = 2.5  # natural scenes (paper, Table 6)
PORTRAIT_GUIDANCE = 2.0
TEACHER_GUIDANCE = 4.5  # PixelHacker's own
