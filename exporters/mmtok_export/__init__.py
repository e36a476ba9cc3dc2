"""The selection as a graph: ONNX, and engines built from it."""
