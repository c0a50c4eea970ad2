"""Who this device is: its key, its certificate, and how it gets them."""
