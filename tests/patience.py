"""How long the tests wait for what must come: a guard against hangs, which measures no speed.

What is waited for takes a minute at most on an idle machine, the build of all kernels. On one that
is shared it may take twenty times as long, and is right nevertheless; what hangs, hangs for ever.
"""

PATIENCE = 3600.0  # seconds, for a process to answer or to end
GROUP_TIMEOUT = 1200.0  # seconds, of a process group: less, so that its error is heard of
