"""Students: bring a model in, quantize it once, write codes back, export the devices' file."""
