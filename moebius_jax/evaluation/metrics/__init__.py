"""What results are measured by: of each picture, and of sets of them."""
