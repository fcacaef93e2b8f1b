"""The checks of the ops that compute a layer's experts."""
