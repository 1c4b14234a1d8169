"""What a completion is: its request, the catalogue that serves it, and the rules between them. Pure."""
