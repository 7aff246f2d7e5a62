"""The Metal kernels on this machine's CPU: a translator of their source to C++, a shim of Metal's library, a device."""
