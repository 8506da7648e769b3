"""What heads may see while learning: windows and clusters, and how they become a topology."""
