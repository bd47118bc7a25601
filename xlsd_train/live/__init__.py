"""Runs that go on -> a page in a browser that follows them.

`server` answers requests, `runs` reads what its page shows, `follow` what was appended to a run's
logs since then. The page is that of `report`. Nothing is written.
No module loads torch.
"""
