"""DeepSpeed as an engine: the one place that calls it, its private names included.

The package is optional and pinned (``package.VERSION``), as what is called here is not all public.
"""
