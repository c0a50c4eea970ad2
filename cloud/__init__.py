"""What runs at the centre. May import edge: it tests with what ships."""
