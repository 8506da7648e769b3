"""Trees learned by gradient descent on p-adic digits."""
