"""One layer's attention run on the device of its tensors, forward and backward."""
