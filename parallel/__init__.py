"""Device mesh, and the function that distributes a single-device model over the mesh."""
