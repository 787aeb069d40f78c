"""Model execution: loading, block pool, prefix cache, scheduler, runner, sampler.

The engine knows no process, no socket and no clock: time is an argument where it is needed.
"""
