import ctypes


class StandIn:
    """The calls of the CUDA driver that scripts make, on memory of this process. Protection is real."""

    def __init__(self):
        self.lost = 0
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        self.libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self.mapped = []

    def cuCtxSynchronize(self):
        return self.lost

    def cuMemAddressReserve(self, address, size, *rest):
        granule = 2 << 20
        assert size.value % granule == 0
        found = self.libc.mmap(None, size.value + granule, 0, 0x4022, -1, 0)  # private, anonymous, no reserve
        address._obj.value = -(-found // granule) * granule
        return 0

    def cuMemCreate(self, handle, size, wanted, flags):
        assert (wanted._obj.type, wanted._obj.location.type, ctypes.sizeof(wanted._obj)) == (1, 1, 32)
        handle._obj.value = size.value
        return 0

    def cuMemMap(self, address, size, offset, handle, flags):
        assert handle.value == size.value
        self.mapped.append((address.value, size.value))
        return 0

    def cuMemSetAccess(self, address, size, access, count):
        assert address.value % (2 << 20) == size.value % (2 << 20) == 0
        assert any(low <= address.value and address.value + size.value <= low + long for low, long in self.mapped)
        return self.libc.mprotect(address.value, size.value, {1: 1, 3: 3}[access._obj.flags])


def pretend():
    """Puts the stand-in in the place of the driver; for a process that ends soon."""
    load, as_tensor, driver = ctypes.CDLL, torch.as_tensor, StandIn()  # noqa: F821

    def from_address(one, **where):
        if not hasattr(one, "__cuda_array_interface__"):
            return as_tensor(one, **where)
        (address, _), (size,) = one.__cuda_array_interface__["data"], one.__cuda_array_interface__["shape"]
        memory = (ctypes.c_ubyte * size).from_address(address)
        memory.keeper = one
        return torch.frombuffer(memory, dtype=torch.uint8)  # noqa: F821

    ctypes.CDLL = lambda name, *rest, **more: driver if name == "libcuda.so.1" else load(name, *rest, **more)
    torch.cuda.is_available, torch.cuda.current_device = (lambda: True), (lambda: 0)  # noqa: F821
    torch.as_tensor = from_address  # noqa: F821
    torch.cuda.graph_pool_handle = lambda: None  # noqa: F821
    torch.cuda.is_current_stream_capturing = lambda: False  # noqa: F821
    if "capture" in globals():
        globals().update(warm_up=lambda function: function(), capture=lambda pool, function: again(function))


def again(function):
    """In the place of a graph, and what its capture returned: a replay is a call, whose result is copied there."""
    torch.cuda.is_current_stream_capturing = lambda: True  # noqa: F821
    try:
        result = function()
    except Exception as error:
        raise CaptureFailed(f"{type(error).__name__}: {error}") from error  # noqa: F821
    finally:
        torch.cuda.is_current_stream_capturing = lambda: False  # noqa: F821

    class Graph:
        def replay(self):
            many = isinstance(result, (tuple, list))
            for kept, new in zip(result, function(), strict=False) if many else ((result, function()),):
                kept.copy_(new)

    return Graph(), result
