"""The choice of GPU tiles by timing them: `surgeon tune`, for a machine with a GPU and Triton."""
