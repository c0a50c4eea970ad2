"""The student's runtime: ONNX Runtime session, key-value cache, tokens, sampling."""
