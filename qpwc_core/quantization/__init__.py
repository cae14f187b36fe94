"""Int8: which tensors are rounded (``configs``), to which ranges (``calibration``), and the export to TFLite.

Int8 are the convolutions, the features, the warped features and the cost volume. The flow, its upsampling,
the warp's coordinates and the last convolution of each level, whose output is added to the flow, stay float.
"""
