"""What watches over a run: bad steps, ranks that hang, ranks and files that are not what they should be."""
