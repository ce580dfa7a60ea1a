"""What the peers share: median times by CUDA events, and the memory a call adds."""

import torch
import torch._dynamo


def allow_recompiles(count=64):
    """Every shape is compiled on its own; the limit's name changed with PyTorch 2.6."""
    config = torch._dynamo.config
    setattr(config, "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit", count)


def median_ms(fn, rounds=7, budget_ms=1500.0, least=3, warm=1):
    """Median milliseconds of `fn` by device events: `warm` calls, then up to `rounds` rounds or `budget_ms` in all, but at least `least` rounds."""
    for _ in range(warm):
        fn()
    times = []
    while len(times) < rounds and (len(times) < least or sum(times) < budget_ms):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def added_bytes(fn):
    """Peak bytes that PyTorch's allocator holds during one call, over what it held before: results included, inputs not."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = fn()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def heading():
    return f"{torch.cuda.get_device_name()}; PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
