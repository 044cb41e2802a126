"""The doors: each command turns words into objects, calls one workflow function, and shows what comes back."""
