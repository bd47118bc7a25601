"""Runs that go on -> a page in a browser that follows them.

`server` answers requests, `follow` reads what was appended to a run's logs, `pace` predicts when
runs end. The page is that of `report`. Nothing is written. No module loads torch.
"""
