"""A model for other runtimes: three programs of arrays, and a manifest on how to call them (docs/export.md).

`programs` says what is exported, `stablehlo` and `onnx` how, `manifest` what else a caller must know, `write`
puts a folder together.
"""
