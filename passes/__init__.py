"""The graph passes, imported as dropit_fx.passes."""
