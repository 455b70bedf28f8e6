"""The lines of the catalogue, one file per room that has many. `core.catalogue` looks them up."""
