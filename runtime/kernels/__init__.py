"""Forward and backward passes of one layer's attention, on the device of its tensors."""
