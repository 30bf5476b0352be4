"""The mesh and the one recipe that turns a model into a distributed one."""
