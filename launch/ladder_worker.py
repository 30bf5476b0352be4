"""Entry point of a ladder's worker process: ``python -m allometry.launch.ladder_worker``."""

from __future__ import annotations

from allometry.data.processes import end_with_launcher
from allometry.launch.start import settle_allocator, settle_cuda_allocator


def main() -> None:
    """Choose the memory allocators, before torch is imported, and train the requested runs."""
    end_with_launcher()
    allocator = settle_allocator("auto")
    cuda_allocator = settle_cuda_allocator()
    from allometry.studies.ladder.worker import serve

    serve(allocator, cuda_allocator)


if __name__ == "__main__":
    main()
