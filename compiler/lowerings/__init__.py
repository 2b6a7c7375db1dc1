"""How operators become ONNX nodes, a file for each family; ``compiler.lower`` holds the table."""
