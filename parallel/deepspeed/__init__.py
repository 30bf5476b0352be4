"""DeepSpeed as ZeRO engine; only this package calls DeepSpeed, including its private names.

DeepSpeed is optional and pinned to ``package.VERSION``, since some of the names are not public.
"""
