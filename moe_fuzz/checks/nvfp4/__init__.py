"""The checks of quantizing to NVFP4: bytes where the contract gives them, else what float32 arithmetic may give."""
