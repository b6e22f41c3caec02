"""An event module that lets any process of this user trace the service (Linux, Yama)."""

import ctypes

PR_SET_PTRACER = 0x59616D61

ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
